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

// signalAct is what a signal does to a server.
type signalAct struct {
	name   string // as unix.SignalName has it
	stop   bool   // the server stops in order
	insist bool   // a second one of these ends the process at once
	dump   bool   // what every goroutine does is logged
	silent bool   // ignored without a line in the log
}

// signalsLeft are those that cannot be caught, that the Go runtime needs for
// itself, or that are not sent to make a server act.
var signalsLeft = []string{"SIGKILL", "SIGSTOP", "SIGURG", "SIGPROF", "SIGCHLD", "SIGCONT", "SIGWINCH", "SIGINFO"}

// sigrtmin3 is what systemd in a container takes for a request to halt, and
// container runtimes send to stop such an image. Signals from 32 on have no names.
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

// actOf returns what a signal does that is not in signalsLeft. The table of
// docs/operations.md has the same, with reasons.
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
	case "SIGHUP": // log rotation sends it to daemons; a terminal sends it as it is closed
		a.stop = atTerminal
	case "SIGPIPE", "SIGXFSZ", "SIGTSTP", "SIGTTIN", "SIGTTOU":
		// A write to a pipe without a reader, or of a file beyond RLIMIT_FSIZE, returns an
		// error; one to a terminal by a server in its background is done.
		a.silent = true
	}
	return a
}

// atTerminal is whether the server was started at a terminal. When that is closed
// it is a terminal no more.
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

// accepts reports whether connections can be accepted from ln: a socket that was
// handed over may be connected, or bound and no more.
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

// descriptorLimit is how many files the process may open at once; 0 if that is not
// known. Go has raised the soft limit to the hard one at the start.
func descriptorLimit() uint64 {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0
	}
	return uint64(limit.Cur) // an int64 on some systems
}

// handedOver returns the listening sockets that this process was started with,
// by the protocol of systemd's sd_listen_fds(3): public, admin, both or neither.
// Sockets without names are these two in this order. What another process was
// meant to get (LISTEN_PID) is ignored.
func handedOver() (map[string]*net.TCPListener, error) {
	names := []string{"public", "admin"}
	sockets := map[string]*net.TCPListener{}
	files := activation.Files(true)
	for i, f := range files {
		defer f.Close() // the listener has a copy
		name := f.Name()
		if name == fmt.Sprint("LISTEN_FD_", f.Fd()) && i < len(names) { // without a name
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

// notifySystemd reports to systemd, if that started this process, that it is ready, then
// that it is alive at twice the pace of the watchdog, and that it stops when stopping is
// closed. Like /healthz it promises that the process runs and answers, not that ids can be
// counted: a restart would not repair Redis.
//
// It closes done when systemd has the last of these. A write to systemd may block.
func notifySystemd(stopping <-chan struct{}, done chan<- struct{}, log zerolog.Logger) {
	notify := func(state string) {
		if _, err := daemon.SdNotify(false, state); err != nil {
			log.Warn().Err(err).Str("state", state).Msg("systemd could not be notified")
		}
	}
	var tick <-chan time.Time // never, without a watchdog
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
