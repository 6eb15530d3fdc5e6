//go:build unix

package main

import (
	"fmt"
	"net"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/mattn/go-isatty"
	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"
)

// signalAct describes what the server does when it gets a signal.
type signalAct struct {
	name   string // as unix.SignalName returns it
	stop   bool   // the server stops in order
	insist bool   // a second signal with insist ends the process at once
	dump   bool   // the stacks of all goroutines are logged
	silent bool   // ignored without a line in the log
}

// signalsLeft are the signals that are not handled: they cannot be caught, or the Go runtime
// needs them for itself, or they are not meant to make a server act.
var signalsLeft = []string{"SIGKILL", "SIGSTOP", "SIGURG", "SIGPROF", "SIGCHLD", "SIGCONT", "SIGWINCH", "SIGINFO"}

// sigrtmin3 is the signal with which container runtimes stop an image that runs systemd, which
// takes it for a request to halt. Signals from 32 on have no names in package unix.
const (
	sigrtmin3   = "SIGRTMIN+3"
	lastSignal  = 64
	realTimeMin = 34
)

func signalName(s os.Signal) string {
	n, _ := s.(syscall.Signal)
	if name := unix.SignalName(n); name != "" {
		return name
	}
	if n >= realTimeMin {
		return fmt.Sprintf("SIGRTMIN+%d", n-realTimeMin)
	}
	return fmt.Sprintf("signal %d", n)
}

// actOf returns what the server does on a signal that is not in signalsLeft. A table in
// docs/operations.md lists the same, with reasons.
func actOf(s os.Signal) signalAct {
	a := signalAct{name: signalName(s)}
	switch a.name {
	case "SIGTERM", "SIGINT":
		a.stop, a.insist = true, true
	case "SIGQUIT":
		a.stop, a.insist, a.dump = true, true, true
	case "SIGABRT":
		a.stop, a.dump = true, true
	case "SIGPWR", "SIGXCPU", sigrtmin3, "SIGILL", "SIGBUS", "SIGFPE", "SIGSEGV":
		a.stop = true
	case "SIGHUP": // log rotation sends it to daemons; a terminal sends it when it is closed
		a.stop = atTerminal
	case "SIGPIPE", "SIGXFSZ", "SIGTSTP", "SIGTTIN", "SIGTTOU":
		// With these ignored, a write to a pipe without a reader, or to a file beyond
		// RLIMIT_FSIZE, returns an error; and a server in the background of a terminal can
		// write to it.
		a.silent = true
	}
	return a
}

// atTerminal is whether the server was started at a terminal. It is determined at the start,
// because a terminal that was closed no longer counts as one.
var atTerminal = isatty.IsTerminal(os.Stdin.Fd()) || isatty.IsTerminal(os.Stderr.Fd())

// notifySignals sends the signals that are not silent to c.
func notifySignals(c chan<- os.Signal) {
	nohup := signal.Ignored(syscall.SIGHUP)
	for n := syscall.Signal(1); n <= lastSignal; n++ {
		name := signalName(n)
		switch {
		case slices.Contains(signalsLeft, name), n == syscall.SIGHUP && nohup:
		case actOf(n).silent:
			signal.Ignore(n)
		default:
			signal.Notify(c, n)
		}
	}
}

// accepts reports whether connections can be accepted from ln: a socket that was handed over
// may be a connection, or bound but not listening.
func accepts(ln *net.TCPListener) bool {
	raw, err := ln.SyscallConn()
	if err != nil {
		return false
	}
	listening := 0
	if failed := raw.Control(func(fd uintptr) {
		listening, err = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ACCEPTCONN)
	}); failed != nil {
		return false
	}
	return err == nil && listening != 0
}

// descriptorLimit returns how many files the process may have open at once; 0 if that is not
// known. The Go runtime raises the soft limit to the hard one at the start.
func descriptorLimit() uint64 {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0
	}
	return uint64(limit.Cur) // an int64 on some systems
}

// handedOver returns the listening sockets that systemd passed to this process by the protocol
// of sd_listen_fds(3), by their names: public, admin, both or neither. If the sockets have no
// names, the first is public and the second admin. Sockets that were meant for another process
// (LISTEN_PID) are ignored.
func handedOver() (map[string]*net.TCPListener, error) {
	names := []string{"public", "admin"}
	sockets := map[string]*net.TCPListener{}
	files := activation.Files(true)
	for i, f := range files {
		defer f.Close() // the listener has a copy
		name := f.Name()
		if name == fmt.Sprint("LISTEN_FD_", f.Fd()) && i < len(names) { // it has no name
			name = names[i]
		}
		switch {
		case name != names[0] && name != names[1]:
			return nil, fmt.Errorf("LISTEN_FDNAMES: socket %d of %d has the name %q: want public or admin (FileDescriptorName= of the socket unit)", i+1, len(files), name)
		case sockets[name] != nil:
			return nil, fmt.Errorf("LISTEN_FDNAMES: two sockets have the name %q: want one of each", name)
		}
		ln, err := net.FileListener(f)
		if err != nil {
			return nil, fmt.Errorf("LISTEN_FDS: the %s socket: %w", name, err)
		}
		tcp, ok := ln.(*net.TCPListener)
		if !ok || !accepts(tcp) {
			return nil, fmt.Errorf("LISTEN_FDS: the %s socket is not a listening TCP socket", name)
		}
		sockets[name] = tcp
	}
	return sockets, nil
}

// notifySystemd reports to systemd, if that started this process: first that the server is
// ready; then, if the watchdog is on, twice in each of its periods that the process is alive;
// and, when stopping is closed, that it stops. As with /healthz, alive means that the process
// runs, not that ids can be counted: a restart would not repair Redis.
//
// It closes done when it has reported the stop: a write to systemd may block. It never returns,
// so the watchdog is also served during the stop.
func notifySystemd(stopping <-chan struct{}, done chan<- struct{}, log zerolog.Logger) {
	notify := func(state string) {
		if _, err := daemon.SdNotify(false, state); err != nil {
			log.Warn().Err(err).Str("state", state).Msg("systemd could not be notified")
		}
	}
	var tick <-chan time.Time // nil, which never ticks, if the watchdog is off
	if within, err := daemon.SdWatchdogEnabled(true); err != nil {
		log.Warn().Err(err).Msg("the watchdog of systemd could not be notified")
	} else if within > 0 {
		tick = time.Tick(within / 2)
	}
	notify(daemon.SdNotifyReady)
	for {
		select {
		case <-tick:
			notify(daemon.SdNotifyWatchdog)
		case <-stopping:
			stopping = nil
			notify(daemon.SdNotifyStopping)
			close(done)
		}
	}
}
