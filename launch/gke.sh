#!/usr/bin/env bash
# Runs an experiment on the TPUs of a Kubernetes cluster (GKE), as a JobSet with one pod per TPU machine.
#
#   launch/gke.sh run    --name N --accelerator A --topology T --image I STORAGE [flags] -- FLAGS
#   launch/gke.sh fetch  --name N STORAGE --fetch DIR -- --workdir WORKDIR    copies the results to DIR
#   launch/gke.sh delete --name N                                             ends and removes the run
#
# FLAGS go to `python -m xtransfer.main` in every pod unchanged; --config.platform=tpu is added. The
# workdir is on STORAGE, which every pod mounts at /mnt/xtransfer: --claim PVC (ReadWriteMany) or --bucket B. If a pod
# is preempted, all end, the JobSet restarts them, and they resume.
#
#   --accelerator A      the node pool's: tpu-v5-lite-podslice (v5e), tpu-v6e-slice, or tpu-v5p-slice
#   --topology T         of the node pool: 2x4, 16x16, 2x2x2, …
#   --chips-per-pod C    the TPU chips of one machine (default: all of a v5e or v6e topology up to 8, else 4)
#   --image I            an image built from launch/Dockerfile
#   --claim PVC          a volume claim that all pods may mount
#   --bucket B           a Cloud Storage bucket, with GKE's Cloud Storage FUSE driver
#   --service-account S  the Kubernetes service account that may use the bucket
#   --spot               use a spot node pool
#   --restarts K         how often the JobSet may restart (default: 30)
#   --namespace NS       (default: kubectl's)
#   --logs DIR           one log per pod (default: runs/N.logs)
#   --fetch DIR          copy the results, without checkpoints, to DIR when the run is done; with --checkpoints, all
#   --delete             remove the JobSet when the run is done and its results are fetched
#   --dry-run            print the commands and the manifest, and run nothing
#
# Ctrl-C leaves the run in the cluster: the same command follows it again.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name="" accelerator="" topology="" chips_per_pod="" image="" claim="" bucket="" service_account="" spot=false
restarts=30 namespace="" logs="" fetch="" checkpoints=false delete=false
shared="/mnt/xtransfer" workdir="" pods=1 followed=" " followers=()

kube() { call kubectl ${namespace:+"--namespace=$namespace"} "$@"; }

json() { # prints the arguments as a JSON list, which is also YAML; doubles $, because Kubernetes expands $(NAME)
  local word list=""
  for word in "$@"; do
    word="${word//\\/\\\\}"
    word="${word//\"/\\\"}"
    word="${word//$'\n'/\\n}"
    word="${word//$'\r'/\\r}"
    word="${word//$'\t'/\\t}"
    word="${word//\$/\$\$}"
    list="$list${list:+, }\"$word\""
  done
  printf '[%s]\n' "$list"
}

count_pods() { # sets $pods and $chips_per_pod
  local chips=1 side
  [[ "$topology" =~ ^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3})+$ ]] || die "--topology '$topology' is not a topology such as 2x4"
  for side in ${topology//x/ }; do chips=$((chips * side)); done
  if [[ -z "$chips_per_pod" ]]; then
    chips_per_pod=4
    if [[ "$accelerator" == *v5-lite* || "$accelerator" == *v6e* ]] && [[ $chips -le 8 ]]; then chips_per_pod=$chips; fi
  fi
  check_number chips-per-pod "$chips_per_pod" 1
  [[ $((chips % chips_per_pod)) -eq 0 ]] ||
    die "--topology $topology has $chips chips, which is not a multiple of --chips-per-pod $chips_per_pod"
  pods=$((chips / chips_per_pod))
}

only_if() { # condition: whether to keep the lines marked with it
  case "$1" in
    spot) $spot ;;
    bucket) [[ -n "$bucket" ]] ;;
    claim) [[ -n "$claim" ]] ;;
    account) [[ -n "$service_account" ]] ;;
    # The statuses of an error that would recur. One of several pods that exits with 1 may only have lost a peer.
    alone) [[ $pods -eq 1 ]] ;;
    *) die "launch/jobset.yaml: no condition is called '$1'" ;;
  esac
}

manifest() { # prints launch/jobset.yaml, filled in
  local line command
  command="$(json /xtransfer/.venv/bin/python -m xtransfer.main "${main_flags[@]}")"
  while IFS= read -r line; do
    [[ "$line" != "#"* ]] || continue
    if [[ "$line" =~ ^(.*[^ ])\ *\#\ if\ ([a-z]+)$ ]]; then
      only_if "${BASH_REMATCH[2]}" || continue
      line="${BASH_REMATCH[1]}"
    fi
    case "$line" in # one placeholder per line, so that inserted values are not searched again
      *@COMMAND@*) line="${line%%@COMMAND@*}$command" ;;
      *@NAME@*) line="${line/@NAME@/$name}" ;;
      *@PODS@*) line="${line/@PODS@/$pods}" ;;
      *@CHIPS@*) line="${line/@CHIPS@/$chips_per_pod}" ;;
      *@CLAIM@*) line="${line/@CLAIM@/$claim}" ;;
      *@IMAGE@*) line="${line/@IMAGE@/$image}" ;;
      *@BUCKET@*) line="${line/@BUCKET@/$bucket}" ;;
      *@RESTARTS@*) line="${line/@RESTARTS@/$restarts}" ;;
      *@TOPOLOGY@*) line="${line/@TOPOLOGY@/$topology}" ;;
      *@ACCELERATOR@*) line="${line/@ACCELERATOR@/$accelerator}" ;;
      *@SERVICE_ACCOUNT@*) line="${line/@SERVICE_ACCOUNT@/$service_account}" ;;
    esac
    printf '%s\n' "$line"
  done <"$root/launch/jobset.yaml"
}

follow_new() { # follows the log of each newly started pod
  local pod place phase
  while read -r pod place phase; do
    [[ -n "$pod" && "$phase" != Pending && "$followed" != *" $pod "* ]] || continue
    followed="$followed$pod "
    set -m
    if [[ "$place" == 0 ]]; then
      (kube logs --follow "$pod" --container=main 2>&1 | tee -a "$logs/worker-0.log") </dev/null &
    else
      kube logs --follow "$pod" --container=main </dev/null >>"$logs/worker-$place.log" 2>&1 &
    fi
    followers+=("$!")
    set +m
  done < <(kube get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name" "--output=jsonpath=$pod_lines" || true)
}

leave() { # exit status: leaves the run going after Ctrl-C
  stop_following
  say "the run continues in the cluster: the same command follows it again, 'launch/gke.sh delete' ends it"
  exit "$1"
}

stop_following() {
  local pid
  for pid in ${followers[@]+"${followers[@]}"}; do kill -TERM -- "-$pid" 2>/dev/null || true; done
}

follow() { # returns when the JobSet is done; false if it failed
  local conditions misses=0 pid
  trap 'leave 130' INT
  trap 'leave 143' TERM
  while :; do
    follow_new
    if ! conditions="$(kube get jobset "$name" "--output=jsonpath=$true_conditions")"; then
      misses=$((misses + 1))
      [[ $misses -le 10 ]] || die "kubectl cannot find the JobSet $name any more (its message is above)"
    else
      misses=0
    fi
    case "$conditions" in
      *Completed*) break ;;
      *Failed*) stop_following && return 1 ;;
    esac
    sleep "$poll"
  done
  follow_new
  for pid in ${followers[@]+"${followers[@]}"}; do wait "$pid" || true; done
}

run() {
  local file="runs/$name.yaml"
  if $dry_run; then
    printf "kubectl%s apply --filename=- <<'END'\n" "${namespace:+ --namespace=$namespace}"
    manifest && echo END
  else
    mkdir -p "$logs" "$(dirname "$file")"
    manifest >"$file"
    # A JobSet's template cannot change: the same command finds its own, and another command needs another name.
    kube apply "--filename=$file" >&2 ||
      die "the JobSet was not accepted (kubectl's message is above); if another run is named $name, delete it: launch/gke.sh delete --name $name"
    follow || {
      tail -n 3 "$logs/worker-0.log" >&2 || true
      die "the run failed (logs: $logs/worker-*.log); fix the cause, then launch/gke.sh delete --name $name and start again"
    }
  fi
  [[ -z "$fetch" ]] || fetch_results
  if $delete; then remove; fi
}

remove() { kube delete jobset "$name"; }

fetch_results() { # copies the workdir to $fetch, without checkpoints unless requested
  local -a without=()
  call mkdir -p "$fetch"
  if [[ -n "$bucket" ]]; then
    $checkpoints || without=('--exclude=(^|.*/)checkpoints/.*')
    call gcloud storage rsync --recursive ${without[@]+"${without[@]}"} "gs://$bucket/${workdir#"$shared"/}" "$fetch"
    return
  fi
  # A pod that only mounts the claim.
  kube run "$name-fetch" --image=debian:stable-slim --restart=Never "--overrides=$(reader)"
  kube wait --for=condition=Ready "pod/$name-fetch" --timeout=300s || die "the pod that reads --claim $claim did not start"
  $checkpoints || without=(--exclude=checkpoints)
  if $dry_run; then
    kube exec "$name-fetch" -- tar -C "$workdir" ${without[@]+"${without[@]}"} -cf - . | tr -d '\n'
    echo " | $(call tar -C "$fetch" -xf -)"
  else
    kube exec "$name-fetch" -- tar -C "$workdir" ${without[@]+"${without[@]}"} -cf - . | tar -C "$fetch" -xf - ||
      die "the results could not be copied; the pod $name-fetch is still running"
  fi
  kube delete pod "$name-fetch" --wait=false
}

reader() { # prints the part of a pod's spec that mounts the claim
  printf '{"spec": {"containers": [{"name": "fetch", "image": "debian:stable-slim", "command": ["sleep", "86400"], '
  printf '"volumeMounts": [{"name": "shared", "mountPath": "%s"}]}], ' "$shared"
  printf '"volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": "%s"}}]}}\n' "$claim"
}

check_unquoted() { # flag and value, which goes into the manifest unquoted
  [[ "$2" =~ ^[A-Za-z0-9._/:@-]*$ ]] || die "--$1: '$2' has a character that Kubernetes does not allow there"
}

check_name() { # flag and name: an RFC 1123 label, or for a bucket or a claim, labels with dots
  local dot=""
  [[ "$1" != bucket && "$1" != claim && "$1" != service-account ]] || dot="."
  [[ "$1" != bucket ]] || dot="._"
  [[ -z "$2" || "$2" =~ ^[a-z0-9]([a-z0-9$dot-]{0,61}[a-z0-9])?$ ]] ||
    die "--$1: '$2' is not a name that ${3:-Kubernetes} allows: lower-case letters, digits and - (at most 63, the first and last no -)"
}

main() {
  local command="${1:-}" flag
  case "$command" in
    run | fetch | delete) shift ;;
    -h | --help) usage && exit 0 ;;
    *) die "'$command' is not one of run, fetch, delete (see --help)" ;;
  esac
  parse_flags "name accelerator topology chips-per-pod image claim bucket service-account restarts namespace logs fetch" \
    "spot checkpoints delete dry-run" "$@"
  required name
  bucket="${bucket#gs://}"
  for flag in accelerator image; do check_unquoted "$flag" "${!flag}"; done
  for flag in name claim bucket service_account namespace; do check_name "${flag//_/-}" "${!flag}"; done
  # The JobSet's pods are named NAME-main-0-INDEX-xxxxx, which must also be a label that begins with a letter.
  [[ "$name" == [a-z]* && ${#name} -le 45 ]] || die "--name '$name' must begin with a letter and have at most 45 characters"
  check_number restarts "$restarts" 0
  workdir="$(flag_of_main workdir)" workdir="${workdir%/}" logs="${logs:-runs/$name.logs}"
  if [[ "$command" != delete ]]; then
    [[ -n "$claim$bucket" && (-z "$claim" || -z "$bucket") ]] || die "where is the workdir? Give --claim or --bucket"
    is_below "$shared" "$workdir" || die "--workdir '$workdir' is not below $shared, where the pods share storage"
  fi
  case "$command" in
    run)
      required accelerator topology image
      count_pods
      require_main_flags config
      default_platform tpu
      run
      ;;
    fetch) required fetch && fetch_results ;;
    delete) remove ;;
  esac
}

pod_lines='{range .items[*]}{.metadata.name}{" "}{.metadata.annotations.batch\.kubernetes\.io/job-completion-index}{" "}'
pod_lines="$pod_lines"'{.status.phase}{"\n"}{end}'
true_conditions='{range .status.conditions[?(@.status=="True")]}{.type}{" "}{end}'
main "$@"
