#!/bin/sh
# A SLURM of one node below DIR, on loopback ports of its own, for tests: slurm_node.sh start DIR [PID] | slurm_node.sh stop DIR
# With a PID it stops by itself when that process is gone.
# It needs root and Debian's slurmctld, slurmd and munge. The partition is "main" with 4 (pretended) cores; SLURM_CONF=DIR/slurm.conf reaches it.
set -eu
PATH=$PATH:/usr/sbin:/sbin

ours() {  # the process of a daemon that start began, where it is there; the number may be another's by now
    pid=$(cat "$1/$2.pid" 2>/dev/null || :)
    [ -n "$pid" ] && read -r _ name state _ 2>/dev/null < "/proc/$pid/stat" && [ "$name" = "($2)" ] && [ "$state" != Z ] && echo "$pid"
}

stop() {  # ends the jobs, and then what start began
    if ours "$1" slurmctld > /dev/null; then
        export SLURM_CONF="$1/slurm.conf"
        scancel --user=root 2>/dev/null || :
        tries=60
        while [ -n "$(squeue --noheader 2>/dev/null)" ] && [ "$tries" -gt 0 ]; do sleep 0.1; tries=$((tries - 1)); done
    fi
    for daemon in slurmd slurmctld munged; do kill "$(ours "$1" $daemon)" 2>/dev/null || :; done
    for daemon in slurmd slurmctld munged; do
        tries=50
        while pid=$(ours "$1" $daemon) && [ "$tries" -gt 0 ]; do sleep 0.1; tries=$((tries - 1)); done
        kill -9 "$pid" 2>/dev/null || :
        rm -f "$1/$daemon.pid"
    done
}

start() {
    dir=$1
    until_gone=${2-}
    mkdir -p "$dir/state" "$dir/spool"
    chmod 755 "$dir"
    head -c 1024 /dev/urandom > "$dir/munge.key"
    chmod 600 "$dir/munge.key"
    host=$(hostname -s)
    ports=$(python3 -c 'import socket; s = [socket.create_server(("127.0.0.1", 0)) for _ in "12"]; print(*(x.getsockname()[1] for x in s))')
    cat > "$dir/slurm.conf" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports% *}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=100000
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=5
InactiveLimit=0
NodeName=$host NodeAddr=127.0.0.1 Port=${ports#* } CPUs=4 RealMemory=1000
PartitionName=main Nodes=$host Default=YES MaxTime=60 State=UP
END
    export SLURM_CONF="$dir/slurm.conf"
    trap 'stop "$dir"' EXIT
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" --log-file="$dir/munged.log" \
        --seed-file="$dir/munged.seed" --num-threads=2 2>> "$dir/munged.out"
    slurmctld -c -f "$dir/slurm.conf"
    slurmd -f "$dir/slurm.conf"
    tries=100
    until [ "$(sinfo --noheader --format=%T 2>> "$dir/sinfo.out")" = idle ]; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || { echo "the node did not become idle:" >&2; tail -n 20 "$dir"/*.log "$dir"/*.out >&2; exit 1; }
        sleep 0.1
    done
    trap - EXIT
    if [ -n "$until_gone" ]; then
        setsid sh -c 'while kill -0 "$3" && [ -s "$2/slurmctld.pid" ]; do sleep 1; done; exec sh "$1" stop "$2"' - "$0" "$dir" "$until_gone" \
            < /dev/null > /dev/null 2>&1 &
    fi
}

case ${1-} in
    start | stop) command=$1; shift; "$command" "${1:?a folder}" "${2-}" ;;
    *) sed -n 2,4p "$0" >&2; exit 2 ;;
esac
