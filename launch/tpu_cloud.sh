# Sourced by launch/tpu_vm.sh: its calls of gcloud. Needs $name $zone $project $type $runtime_version $spot $queued.
# shellcheck shell=bash
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name="" zone="" project="" type="" runtime_version="" spot=false queued=false retries=30 was_reachable=false
cost_warning="" # the TPU's state, if it may cost money; printed when the script fails
gcloud_output="$(mktemp -d)" # gcloud's latest output, one file per command
trap on_exit EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

on_exit() { # warns, whenever the script fails, that the TPU may still cost money
  local status=$?
  rm -rf "$gcloud_output"
  [[ $status -eq 0 || -z "$cost_warning" ]] || say "$name is $cost_warning: fix the cause and start again, or $(how_to_delete)"
}

how_to_delete() {
  local -a flags=(--name "$name" --zone "$zone" ${project:+--project "$project"})
  ! $queued || flags+=(--queued)
  printf 'launch/tpu_vm.sh delete%s\n' "$(quoted "${flags[@]}")"
}

tpus() { # runs gcloud compute tpus ... for the zone and the project
  call gcloud compute tpus "$@" "--zone=$zone" ${project:+"--project=$project"}
}

default_runtime() { # prints the TPU software that Google names for each generation
  case "$type" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) die "--type $type: name its software with --runtime-version ('gcloud compute tpus tpu-vm versions list' lists them)" ;;
  esac
}

workers_of_type() { # prints the number of machines of a type: v5e and v6e count chips, others cores
  local size="${type##*-}"
  [[ "$type" =~ ^[a-z0-9]+-[1-9][0-9]{0,5}$ ]] || die "--type '$type' is not a TPU type such as v5litepod-8"
  case "$type" in
    v5litepod-* | v6e-*) echo $((size <= 8 ? 1 : size / 4)) ;;
    *) echo $((size <= 8 ? 1 : size / 8)) ;;
  esac
}

ask() { # a describe command: prints the state, ABSENT if nothing has that name, UNREACHABLE if gcloud fails
  if tpus "$@" 2>"$gcloud_output/describe"; then return; fi
  # A missing project, zone, or network is a different error.
  if grep -qE "NOT_FOUND: .*/(nodes|queuedResources)/$name([^A-Za-z0-9_-]|\$)" "$gcloud_output/describe"; then echo ABSENT; else echo UNREACHABLE; fi
}

tpu_state() { # prints ready, waiting, absent, gone (taken away, or ended for good), stopped, or unreachable
  local state
  if $queued; then
    state="$(ask queued-resources describe "$name" "--format=value(state.state)")"
    case "$state" in
      ACTIVE) ;; # its node has a state of its own
      FAILED | SUSPENDED) echo gone && return ;;
      ABSENT) echo absent && return ;;
      UNREACHABLE) echo unreachable && return ;;
      *) echo waiting && return ;;
    esac
  fi
  state="$(ask tpu-vm describe "$name" "--format=value(state)")"
  case "$state" in
    READY) echo ready ;;
    PREEMPTED | TERMINATED | UNKNOWN) echo gone ;;
    STOPPED) echo stopped ;;
    ABSENT) if $queued; then echo waiting; else echo absent; fi ;;
    UNREACHABLE) echo unreachable ;;
    *) echo waiting ;;
  esac
}

create() { # requests the TPU once
  local -a flags=("--accelerator-type=$type")
  ! $spot || flags+=(--spot)
  flags+=(${passed[@]+"${passed[@]}"})
  if $queued; then
    tpus queued-resources create "$name" "--node-id=$name" "--runtime-version=$runtime_version" "${flags[@]}"
  else
    tpus tpu-vm create "$name" "--version=$runtime_version" "${flags[@]}"
  fi
}

obtain() { # requests the TPU until it is granted; only a lack of capacity is retried
  local attempt=1
  while cost_warning="perhaps up, which would cost" && ! create 2>&1 | tee "$gcloud_output/create" >&2; do
    if grep -qiE 'already exists|ALREADY_EXISTS' "$gcloud_output/create"; then return; fi
    if ! grep -qi 'no more capacity' "$gcloud_output/create"; then
      ! grep -qiE 'PERMISSION_DENIED|INVALID_ARGUMENT|NOT_FOUND|quota' "$gcloud_output/create" || cost_warning=""
      ! grep -qi 'quota' "$gcloud_output/create" ||
        die "the project's quota does not allow $type$($spot && echo ' (spot)') in $zone: ask for more (Cloud console, IAM, Quotas), or take another zone or type"
      grep -qiE 'RESOURCE_EXHAUSTED|UNAVAILABLE|stockout|internal error' "$gcloud_output/create" ||
        die "$name could not be created; gcloud's message is above"
    fi
    cost_warning=""
    [[ $attempt -le $retries ]] || die "no capacity for $type in $zone after $attempt attempts: try another zone, or --queued"
    say "no capacity for $type in $zone now; attempt $attempt of $retries, trying again"
    pause "$attempt"
    attempt=$((attempt + 1))
  done
}

discard() { # deletes the TPU, and its queued resource if there is one
  if $queued; then
    tpus queued-resources delete "$name" --force --quiet
  else
    tpus tpu-vm delete "$name" --quiet
  fi
}

bring_up() { # returns when the TPU is ready
  local now before="" obtained=0 misses=0
  if $dry_run; then
    echo "# where $name does not exist yet:"
    create
    return
  fi
  while :; do
    now="$(tpu_state)"
    [[ "$now" == "$before" || "$now" == ready ]] || say "$name is $now"
    before="$now"
    [[ "$now" == unreachable ]] || was_reachable=true
    case "$now" in
      ready) cost_warning="still up, which costs" ;;
      waiting) cost_warning="being created, and will cost when it is up" ;;
      unreachable) ;; # keep the last known state
      *) cost_warning="" ;;
    esac
    case "$now" in
      ready) return ;;
      waiting) sleep "$poll" && continue ;;
      unreachable) # if gcloud has reached it before, wait for the network
        misses=$((misses + 1))
        if ! $was_reachable || [[ $misses -gt $retries ]]; then
          die "gcloud cannot describe $name: $(tail -n 1 "$gcloud_output/describe")"
        fi
        pause "$misses"
        ;;
      stopped) tpus tpu-vm start "$name" ;;
      gone) discard ;;
      absent)
        obtained=$((obtained + 1))
        [[ $obtained -le $((retries + 1)) ]] || die "$name was taken away $retries times before it was ready"
        [[ $obtained -eq 1 ]] || pause "$((obtained - 1))"
        say "asking for $name: $type$($spot && echo ', spot') in $zone"
        obtain
        ;;
    esac
  done
}

count_workers() { # sets $workers
  if $dry_run; then
    workers="$(workers_of_type)"
  else
    workers="$(ask tpu-vm describe "$name" "--format=value(networkEndpoints.len())")"
    [[ "$workers" =~ ^[1-9][0-9]*$ ]] || workers="$(workers_of_type)"
  fi
}

ssh_to() { # worker command: runs it in the worker's home directory
  # A worker that vanishes is noticed within two minutes.
  tpus tpu-vm ssh "$name" "--worker=$1" --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4 \
    --ssh-flag=-oConnectTimeout=20 "--command=$2" </dev/null
}

send_to() { # worker file name: copies it to the worker's home directory
  tpus tpu-vm scp "$2" "$name:$3" "--worker=$1" </dev/null
}
