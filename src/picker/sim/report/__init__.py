"""What runs of `picker simulate` say, for people: a table in the terminal and a page of HTML.

`page` and `plots` need the extra `report`; nothing else imports them when it is loaded.
"""
