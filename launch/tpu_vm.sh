#!/usr/bin/env bash
# Runs an experiment on a Cloud TPU, one VM or a pod, and restarts it after each preemption until it is done.
#
#   launch/tpu_vm.sh up     --name N --zone Z --type v5litepod-8 [flags]                 creates or finds the TPU
#   launch/tpu_vm.sh run    --name N --zone Z --type v5litepod-8 [flags] -- FLAGS        up, then set-up and run
#   launch/tpu_vm.sh fetch  --name N --zone Z [flags] --fetch DIR -- --workdir WORKDIR   copies the results to DIR
#   launch/tpu_vm.sh delete --name N --zone Z [--queued]                                 deletes the TPU
#
# FLAGS go to `python -m xtransfer.main` on every worker unchanged; --config.platform=tpu is added. Paths
# are the workers': relative ones start in the copied checkout, and --storage is mounted at /mnt/xtransfer.
#
#   --project P            the project (default: gcloud's)
#   --spot                 spot capacity: cheap, and may be taken away at any time
#   --queued               request a queued resource, and wait in its queue
#   --runtime-version V    the TPU's software (default: by --type)
#   --create-flag F        one more flag for gcloud's create, such as --create-flag=--network=mine; may be repeated
#   --storage S            gs://BUCKET[/FOLDER] or HOST:/SHARE (NFS, Filestore), mounted at /mnt/xtransfer on every worker
#   --own-storage          you have put the workdir on storage that all workers share and that outlives them
#   --repository URL       clone this instead of copying this checkout, at --revision REV
#   --logs DIR             one log per worker (default: runs/N.logs)
#   --retries K            how often to restart, and to ask again when there is no capacity (default: 30)
#   --fetch DIR            copy the results, without checkpoints, to DIR when the run is done; with --checkpoints, all
#   --delete               delete the TPU when the run is done and its results are fetched
#   --dry-run              print the commands, and run nothing
#
# Exits with 0 when the run is done, or with the run's status if it failed. Ctrl-C leaves the run going: the same command
# follows it again. A failed run leaves the TPU up, and says so.
set -euo pipefail
# shellcheck source=launch/tpu_cloud.sh
source "$(dirname "${BASH_SOURCE[0]}")/tpu_cloud.sh"

repository="" revision="" storage="" logs="" fetch="" own_storage=false checkpoints=false delete=false
shared="/mnt/xtransfer"
bucket_or_share='^(gs://[a-z0-9][a-z0-9._-]*(/.+)?|(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):/[^/].*)$'
workers=1 workdir="" id="" verdict="" failed_worker=0 crashes=0
statuses=() followers=()
# Replaces the files of an earlier delivery; keeps .venv and the files of runs.
unpack='mkdir -p xtransfer && cd xtransfer && if [ -f .copied ]; then tr "\n" "\0" <.copied | xargs -0 rm -f --; fi'
unpack="$unpack && tar -xzf ../xtransfer.tgz && tar -tzf ../xtransfer.tgz >.copied"

check_workdir_storage() { # requires a shared workdir that outlives the workers, for many workers or spot capacity
  if $own_storage || { [[ -n "$storage" ]] && is_below "$shared" "$workdir"; }; then return; fi
  [[ -z "$storage" ]] || die "--workdir $workdir is not below $shared, where --storage is mounted"
  [[ "$(workers_of_type)" -eq 1 ]] ||
    die "$type has $(workers_of_type) workers, and they must share --workdir: give --storage and --workdir $shared/…, or --own-storage"
  ! $spot || die "a spot VM loses its disk when it is taken away: give --storage and --workdir $shared/…, or --own-storage"
}

each_worker() { # shown|quiet function arguments ...: calls function WORKER arguments for all in parallel; sets statuses
  local show="$1" function="$2" worker
  shift 2
  statuses=() followers=()
  for ((worker = 0; worker < workers; worker++)); do
    if $dry_run; then
      "$function" "$worker" "$@"
      continue
    fi
    set -m # each follower is a group of its own, so that Ctrl-C comes here first
    if [[ $worker -eq 0 && "$show" == shown ]]; then
      ("$function" 0 "$@" 2>&1 | tee -a "$logs/worker-0.log") &
    else
      "$function" "$worker" "$@" >>"$logs/worker-$worker.log" 2>&1 &
    fi
    set +m
    followers+=("$!")
  done
  await
}

await() { # waits for the followers; sets statuses
  local worker
  for ((worker = 0; worker < ${#followers[@]}; worker++)); do
    statuses[worker]=0
    wait "${followers[worker]}" || statuses[worker]=$?
  done
  followers=()
}

leave() { # leaves the run going after Ctrl-C
  local pid
  for pid in ${followers[@]+"${followers[@]}"}; do kill -TERM -- "-$pid" 2>/dev/null || true; done
  if [[ ${#followers[@]} -gt 0 ]]; then
    say "the run continues on $name, which costs: the same command follows it again, $(how_to_delete) ends it"
    cost_warning=""
  fi
  exit "$1"
}

pack() { # archive: packs the checkout, including uncommitted changes
  local file
  mkdir -p "$root/runs"
  cd "$root"
  if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    git ls-files -z --cached --others --exclude-standard
  else
    find . \( -name .venv -o -name runs -o -name '*.egg-info' -o -name __pycache__ \) -prune -o -type f -print0
  fi | while IFS= read -r -d '' file; do
    [[ ! -e "$file" ]] || printf '%s\0' "$file"
  done | tar --null -T - -czf "$1"
}

deliver() { # copies the code to every worker, over an earlier copy
  local archive="$root/runs/checkout-$name.tgz"
  if [[ -n "$repository" ]]; then
    each_worker quiet ssh_to "if [ ! -d xtransfer/.git ]; then git clone -q$(quoted "$repository") xtransfer; fi && \
cd xtransfer && git fetch -q origin && git checkout -q --detach$(quoted "$revision")"
    return
  fi
  if $dry_run; then
    echo "# launch/tpu_vm.sh packs the checkout, including uncommitted changes. In a clean checkout this is the same:"
    call git -C "$root" archive "--output=$archive" HEAD
  else
    (pack "$archive") || die "the checkout $root could not be packed"
  fi
  each_worker quiet send_to "$archive" xtransfer.tgz
  $dry_run || rm -f "$archive"
  all_well || return 0
  each_worker quiet ssh_to "$unpack"
}

remotely() { # prints a command for the copied checkout
  printf 'cd xtransfer && bash launch/worker.sh%s\n' "$(quoted "$@")"
}

all_well() { # false if a status is not 0; sets failed_worker to the first of these
  local worker
  for ((worker = 0; worker < ${#statuses[@]}; worker++)); do
    if [[ "${statuses[worker]}" -ne 0 ]]; then
      failed_worker=$worker
      return 1
    fi
  done
}

set_up_workers() { # copies code, installs packages, mounts storage; false if a worker failed
  say "setting up $workers worker(s) of $name; their logs are $logs/worker-*.log"
  deliver
  all_well || return 1
  each_worker quiet ssh_to "$(remotely prepare)"
  all_well || return 1
  [[ -n "$storage" ]] || return 0
  each_worker quiet ssh_to "$(remotely mount "$storage")"
  all_well
}

is_running() { ! $dry_run && ssh_to 0 "$(remotely running)" >/dev/null 2>&1; }

reach() { # waits until ssh works, because keys take a while to arrive on a new machine
  local attempt
  ! $dry_run || return 0
  for attempt in 1 2 3 4 5; do
    if ssh_to 0 true >>"$logs/worker-0.log" 2>&1; then return 0; fi
    pause "$attempt"
  done
  statuses=(255)
  return 1
}

judge() { # statuses -> verdict: finished, lost (restart), or failed (for a reason that would recur)
  local worker status cut=false failed="" crashed=""
  verdict=finished
  if all_well; then return; fi
  verdict=lost
  for worker in "${!statuses[@]}"; do
    status="${statuses[worker]}"
    # If the log lacks the worker's last line, the status is gcloud's, which could not reach the worker.
    if [[ $status -eq 143 || $status -eq 255 ]] || { [[ "$1" == run && $status -ne 0 ]] &&
      ! grep -qF "run $id ended with status $status" "$logs/worker-$worker.log"; }; then
      cut=true
    elif [[ $status -ge 128 || $status -eq 124 ]]; then # aborted, killed, or ended by its watchdog
      crashed="${crashed:-$worker}"
    elif [[ $status -ne 0 ]]; then
      failed="${failed:-$worker}"
    fi
  done
  ! $spot || sleep "$poll" # Google reports a preemption with a delay
  if $cut || [[ "$(tpu_state)" != ready ]]; then
    crashes=0
    return
  fi
  # One of several workers that crashes may have lost a peer; if it recurs, there is another reason.
  if [[ -n "$crashed" && $workers -gt 1 && $crashes -lt 3 ]]; then
    crashes=$((crashes + 1))
    return
  fi
  failed_worker="${crashed:-$failed}"
  verdict=failed
}

attempt() { # sets up and runs once; sets verdict
  bring_up
  count_workers
  if ! reach; then
    judge reach
  elif ! is_running && ! set_up_workers; then
    judge set-up
  else
    say "python -m xtransfer.main$(quoted "${main_flags[@]}")"
    each_worker shown ssh_to "$(remotely run "$id" .venv/bin/python -m xtransfer.main "${main_flags[@]}")"
    judge run
  fi
}

run() {
  local tries=0 started
  started="$(date +%Y%m%d-%H%M%S)-$$"
  if ! $dry_run; then mkdir -p "$logs"; fi
  trap 'leave 130' INT
  trap 'leave 143' TERM
  while :; do
    id="$started-$tries"
    attempt
    case "$verdict" in
      finished) break ;;
      failed)
        tail -n 3 "$logs/worker-$failed_worker.log" >&2
        say "worker $failed_worker failed with status ${statuses[failed_worker]} (log: $logs/worker-$failed_worker.log)"
        exit "${statuses[failed_worker]}"
        ;;
    esac
    tries=$((tries + 1))
    [[ $tries -le $retries ]] || die "gave up after $retries restarts; the same command resumes"
    say "$name was lost (the workers' statuses: ${statuses[*]}); restarting, $tries of $retries"
    pause "$tries"
  done
  trap 'exit 130' INT
  trap 'exit 143' TERM
  [[ -z "$fetch" ]] || fetch_results
  if ! $delete || discard; then return; fi
  cost_warning="" # the message below says it
  die "the run is done${fetch:+ and its results are in $fetch}, but $name could not be deleted: it is still up, which costs: $(how_to_delete)"
}

fetch_results() { # copies the workdir to $fetch, without checkpoints unless requested
  local -a without=()
  local packed="xtransfer-results.tgz"
  call mkdir -p "$fetch"
  if [[ "$storage" == gs://* && "$workdir" == "$shared"/* ]]; then # a bucket can be read without the TPU
    $checkpoints || without=('--exclude=(^|.*/)checkpoints/.*')
    call gcloud storage rsync --recursive ${without[@]+"${without[@]}"} ${project:+"--project=$project"} \
      "${storage%/}/${workdir#"$shared"/}" "$fetch"
    return
  fi
  $checkpoints || without=('--exclude=checkpoints')
  ssh_to 0 "cd xtransfer && tar -C$(quoted "$workdir" ${without[@]+"${without[@]}"}) -czf ~/$packed ." ||
    die "the results could not be packed on $name (is it up, and is $workdir there?)"
  tpus tpu-vm scp "$name:$packed" "$fetch/$packed" --worker=0 </dev/null || die "the results could not be copied from $name"
  call tar -C "$fetch" -xzf "$fetch/$packed"
  call rm -f "$fetch/$packed"
}

main() {
  local command="${1:-}"
  case "$command" in
    up | run | fetch | delete) shift ;;
    -h | --help) usage && exit 0 ;;
    *) die "'$command' is not one of up, run, fetch, delete (see --help)" ;;
  esac
  parse_flags "name zone project type runtime-version create-flag storage repository revision logs retries fetch" \
    "spot queued own-storage checkpoints delete dry-run" "$@"
  required name zone
  [[ "$name" =~ ^[A-Za-z][A-Za-z0-9_-]{0,62}$ ]] ||
    die "--name '$name' is not a name for a TPU: a letter, then letters, digits, - and _, at most 63"
  check_number retries "$retries" 0
  [[ -z "$storage" || "$storage" =~ $bucket_or_share ]] || die "--storage '$storage' is neither gs://BUCKET[/FOLDER] nor HOST:/SHARE"
  storage="${storage%/}" logs="${logs:-runs/$name.logs}" workdir="$(flag_of_main workdir)"
  workdir="${workdir%/}"
  if [[ "$command" == up || "$command" == run ]]; then
    required type
    workers_of_type >/dev/null
    runtime_version="${runtime_version:-$(default_runtime)}"
  fi
  if [[ "$command" == run || "$command" == fetch ]]; then
    require_main_flags workdir
  fi
  [[ "$command" != run ]] || require_main_flags config
  [[ -z "$repository" || -n "$revision" ]] || die "--repository needs --revision too: a commit, a tag or origin/BRANCH"
  if ! $dry_run; then command -v gcloud >/dev/null || die "gcloud is missing: https://cloud.google.com/sdk/docs/install"; fi
  case "$command" in
    up) bring_up ;;
    run)
      check_workdir_storage
      default_platform tpu
      run
      ;;
    fetch) required fetch && fetch_results ;;
    delete) discard ;;
  esac
}

main "$@"
