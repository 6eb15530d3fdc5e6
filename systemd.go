package main

import (
	"fmt"
	"net"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/rs/zerolog"
)

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
// It runs in a goroutine that no one waits for, because a write to systemd may block.
func notifySystemd(stopping <-chan struct{}, log zerolog.Logger) {
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
		}
	}
}
