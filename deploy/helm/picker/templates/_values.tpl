{{/* The values of both layouts as one: those of `router`, with what the older charts' keys say over them. */}}
{{- define "picker.router" -}}
{{- $router := deepCopy .Values.router -}}
{{- $old := .Values.inferenceExtension | default dict -}}
{{- $epp := pick $old "replicas" "image" "extProcPort" "env" "flags" "pluginsConfigFile" "pluginsCustomConfig" "extraContainerPorts" "volumes" "volumeMounts" "resources" "affinity" "tolerations" -}}
{{- $_ := mergeOverwrite $router.epp $epp -}}
{{- $_ := mergeOverwrite $router (pick $old "extraServicePorts" "monitoring" "tracing") -}}
{{- with $old.failureMode }}{{ $_ := set $router.inferencePool "failureMode" . }}{{ end -}}
{{- with $old.sidecar }}{{ $_ := mergeOverwrite $router.proxy . }}{{ end -}}
{{- with $old.endpointsServer }}
{{- if hasKey . "createInferencePool" }}{{ $_ := set $router.inferencePool "create" .createInferencePool }}{{ end -}}
{{- if and (hasKey . "targetPorts") (not $router.inferencePool.create) -}}
{{- $ports := list -}}
{{- range .targetPorts }}{{ $ports = append $ports (dict "number" .) }}{{ end -}}
{{- $_ := set $router.modelServers "targetPorts" $ports -}}
{{- end -}}
{{- range $pair := splitList "," (.endpointSelector | default "") -}}
{{- if $pair }}{{ $_ := set $router.modelServers.matchLabels (splitList "=" $pair | first | trim) (splitList "=" $pair | last | trim) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- $pool := .Values.inferencePool | default dict -}}
{{- with $pool.modelServers }}{{ $_ := mergeOverwrite $router.modelServers . }}{{ end -}}
{{- with $pool.modelServerType }}{{ $_ := set $router.modelServers "type" . }}{{ end -}}
{{- with $pool.modelServerProtocol }}{{ $_ := set $router.modelServers "protocol" . }}{{ end -}}
{{- with $pool.targetPortNumber }}{{ $_ := set $router.modelServers "targetPorts" (list (dict "number" .)) }}{{ end -}}
{{- with $pool.targetPorts }}{{ $_ := set $router.modelServers "targetPorts" . }}{{ end -}}
{{- with .Values.inferenceObjectives }}{{ $_ := set $router "inferenceObjectives" . }}{{ end -}}
{{- toYaml $router -}}
{{- end -}}

{{- define "picker.route" -}}
{{- $route := deepCopy .Values.httpRoute -}}
{{- with .Values.experimentalHttpRoute }}
{{- $_ := mergeOverwrite $route (omit . "enabled") -}}
{{- if hasKey . "enabled" }}{{ $_ := set $route "create" .enabled }}{{ end -}}
{{- end -}}
{{- toYaml $route -}}
{{- end -}}

{{/* What cannot be, in plain words. */}}
{{- define "picker.refuse" -}}
{{- $router := include "picker.router" . | fromYaml -}}
{{- if not $router.modelServers.matchLabels -}}
{{- fail "router.modelServers.matchLabels (or inferencePool.modelServers.matchLabels) is required: the labels of the engines' pods" -}}
{{- end -}}
{{- if eq $router.modelServers.protocol "grpc" -}}
{{- fail "router.modelServers.protocol: picker reads requests of the OpenAI API, not of vLLM's gRPC" -}}
{{- end -}}
{{- if and $router.proxy.enabled $router.proxy.failOpen -}}
{{- fail "router.proxy.failOpen: the Envoy beside picker knows no endpoints, so that it cannot go on without picker" -}}
{{- end -}}
{{- if (.Values.provider.gke.preferredBackends | default dict).enabled -}}
{{- fail "provider.gke.preferredBackends: every replica of picker serves, none is preferred to another" -}}
{{- end -}}
{{- $file := $router.epp.pluginsConfigFile -}}
{{- if not (or (eq $file "default-plugins.yaml") (hasKey $router.epp.pluginsCustomConfig $file)) -}}
{{- fail (printf "router.epp.pluginsConfigFile: router.epp.pluginsCustomConfig has no %q" $file) -}}
{{- end -}}
{{- if and .Values.picker.configSecret (or .Values.picker.config (hasKey $router.epp.pluginsCustomConfig $file)) -}}
{{- fail "picker.configSecret: the configuration stands in picker.config or router.epp.pluginsCustomConfig already" -}}
{{- end -}}
{{- if and .Values.picker.engineAutoscaling.enabled (not .Values.picker.engineAutoscaling.deployment) -}}
{{- fail "picker.engineAutoscaling.deployment is required: the Deployment of the engines" -}}
{{- end -}}
{{- end -}}
