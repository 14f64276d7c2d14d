#!/bin/sh
# docker-engine.sh makes sure that a Docker engine answers, for development and
# tests on a machine without a running service manager. It may be run any number
# of times, by several callers at once.
#
#   an engine answers already          nothing to do
#   root on Debian or a derivative     docker.io is installed if dockerd is
#                                      missing, and started detached
#   anything else                      says what to do, and exits with 1
#
# The engine's log and process ID are in $MUSTER_DOCKER_DIR, by default
# /var/run/muster-docker. MUSTER_DOCKER_WAIT is how many seconds each start may
# take, 60 by default.
set -eu

dir=${MUSTER_DOCKER_DIR:-/var/run/muster-docker}
wait_seconds=${MUSTER_DOCKER_WAIT:-60}

say() { echo "docker-engine: $*" >&2; }

# A docker command alone proves nothing: it may be a bare client.
answers() { timeout 10 docker version --format '{{.Server.Version}}' >/dev/null 2>&1; }

done_if_answers() {
	if answers; then
		say "an engine answers: $(docker version --format '{{.Server.Version}}')"
		exit 0
	fi
}

give_up() {
	say "$*"
	cat >&2 <<-'END'
	docker-engine: to go on, do one of these and run this script again:
	docker-engine:   - start an engine (systemctl start docker, or Docker Desktop)
	docker-engine:   - point DOCKER_HOST at an engine on this machine
	docker-engine:   - run this script as root on Debian or Ubuntu, which installs one
	docker-engine: or leave the tests that need an engine out: MUSTER_SKIP_DOCKER=1
	END
	exit 1
}

install_packages() {
	command -v apt-get >/dev/null || give_up "no dockerd here, and no apt-get to install it with"
	packages="docker.io ca-certificates"
	# With AppArmor in the kernel, dockerd needs its tools to start any container.
	if [ "$(cat /sys/module/apparmor/parameters/enabled 2>/dev/null)" = Y ]; then
		packages="$packages apparmor"
	fi
	export DEBIAN_FRONTEND=noninteractive
	say "installing $packages"
	apt-get update -q >&2 || say "apt-get update failed; trying with the lists at hand"
	# From Debian 13 on, the client is a package of its own.
	if ! command -v docker >/dev/null && apt-cache show docker-cli >/dev/null 2>&1; then
		packages="$packages docker-cli"
	fi
	# shellcheck disable=SC2086 # a list of words
	apt-get install -q -y --no-install-recommends $packages >&2 ||
		give_up "apt-get could not install $packages; its reason is above"
}

# start FLAG... starts dockerd and reports whether it answers in time.
start() {
	say "starting dockerd $*"
	# Descriptor 9 is the lock below; dockerd must not keep it.
	setsid dockerd "$@" >"$dir/dockerd.log" 2>&1 </dev/null 9>&- &
	pid=$!
	echo "$pid" >"$dir/dockerd.pid"
	waited=0
	while [ "$waited" -lt "$wait_seconds" ]; do
		if answers; then return 0; fi
		kill -0 "$pid" 2>/dev/null || return 1
		sleep 1
		waited=$((waited + 1))
	done
	kill "$pid" 2>/dev/null || true
	wait "$pid" 2>/dev/null || true
	return 1
}

done_if_answers
if [ "$(id -u)" -ne 0 ]; then
	give_up "no engine answers, and only root may start one"
fi
if [ -n "${DOCKER_HOST:-}" ]; then
	give_up "no engine answers at DOCKER_HOST=$DOCKER_HOST; unset it to have one started here"
fi

mkdir -p "$dir"
exec 9>"$dir/lock"
flock 9
done_if_answers # another caller may have started it meanwhile

# sbin is not in every root shell's PATH, and dockerd looks iptables up there.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
export PATH
command -v dockerd >/dev/null || install_packages
command -v docker >/dev/null || install_packages
done_if_answers # the package may have started the service

if [ -d /run/systemd/system ]; then
	systemctl start docker || give_up "systemctl could not start docker; see: journalctl -u docker"
	waited=0
	while [ "$waited" -lt "$wait_seconds" ]; do
		done_if_answers
		sleep 1
		waited=$((waited + 1))
	done
	give_up "docker's service runs, and no engine answers within ${wait_seconds}s"
fi

# Plain first. A kernel without netfilter needs the second: jobs without a
# network do not miss it. A kernel without overlayfs needs the third: slow, and
# every container is a full copy of its image.
start || start --iptables=false --ip6tables=false --bridge=none ||
	start --iptables=false --ip6tables=false --bridge=none --storage-driver=vfs || {
	tail -n 20 "$dir/dockerd.log" >&2
	give_up "dockerd does not start; its log is above and in $dir/dockerd.log"
}
done_if_answers
give_up "dockerd started and stopped answering; its log is in $dir/dockerd.log"
