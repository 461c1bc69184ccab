{{- define "picker.name" -}}
{{ .Release.Name | lower | trunc 40 | trimSuffix "-" }}-epp
{{- end -}}

{{- define "picker.selectorLabels" -}}
app.kubernetes.io/name: picker
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "picker.labels" -}}
{{ include "picker.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "picker.metadata" -}}
name: {{ include "picker.name" . }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "picker.labels" . | nindent 2 }}
{{- end -}}

{{/* "true" where one replica serves and the others wait, else nothing. */}}
{{- define "picker.elects" -}}
{{- $flags := (include "picker.router" . | fromYaml).epp.flags | default dict -}}
{{- if has (get $flags "ha-enable-leader-election" | toString | lower) (list "true" "t" "1") }}true{{ end -}}
{{- end -}}

{{/* The file that picker reads, in /config. */}}
{{- define "picker.file" -}}
{{- $router := include "picker.router" . | fromYaml -}}
{{- if hasKey $router.epp.pluginsCustomConfig $router.epp.pluginsConfigFile -}}
{{ $router.epp.pluginsConfigFile }}
{{- else -}}
picker.yaml
{{- end -}}
{{- end -}}

{{- define "picker.replicasSecret" -}}
{{ .Values.picker.replicas.existingSecret | default (printf "%s-replicas" (include "picker.name" .)) }}
{{- end -}}

{{/* Whether destinations to retry on are named, too. */}}
{{- define "picker.fallbacks" -}}
{{- $router := include "picker.router" . | fromYaml -}}
{{- if kindIs "bool" .Values.picker.fallbacks -}}
{{ .Values.picker.fallbacks }}
{{- else -}}
{{ not (or $router.proxy.enabled (has .Values.provider.name (list "gke" "envoy-gateway"))) }}
{{- end -}}
{{- end -}}

{{- define "picker.secure" -}}
{{- $router := include "picker.router" . | fromYaml -}}
{{- $flag := index ($router.epp.flags | default dict) "secure-serving" -}}
{{- if or $router.proxy.enabled (eq (toString $flag) "false") -}}false{{- else -}}true{{- end -}}
{{- end -}}
