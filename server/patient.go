package server

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"verve/internal/logline"
)

const (
	// A failed accept is tried again after acceptWait, then each time after twice as
	// long, up to acceptWaitMost.
	acceptWait     = 5 * time.Millisecond
	acceptWaitMost = time.Second

	// acceptBlip is how long all accepts must have failed before problem reports it: a
	// client that leaves before it is accepted is an error of accept, too.
	acceptBlip = 100 * time.Millisecond
)

// patientListener is a listener whose Accept fails only once it is closed. Any other
// error passes: of the process (EMFILE), of the system (ENFILE, ENOBUFS, ENOMEM), of
// the client (ECONNABORTED), of the network (accept(2) lists those). Each is counted,
// and Accept waits and tries again, while open connections are served.
type patientListener struct {
	net.Listener
	name string // in the log and the metrics
	log  zerolog.Logger

	stop   chan struct{} // ends a wait
	closed sync.Once
	failed atomic.Uint64
	lines  logline.Sampler

	mu     sync.Mutex
	since  time.Time // of the first failure since the last success; zero: there is none
	last   time.Time // of the last failure
	reason string
}

func newPatientListener(ln net.Listener, name string, log zerolog.Logger) *patientListener {
	return &patientListener{Listener: ln, name: name, log: log, stop: make(chan struct{}), lines: logline.Sampler{Every: time.Second}}
}

// Accept returns the next connection, or net.ErrClosed after Close.
func (l *patientListener) Accept() (net.Conn, error) {
	for wait := acceptWait; ; wait = min(2*wait, acceptWaitMost) {
		c, err := l.Listener.Accept()
		if err == nil {
			if wait > acceptWait {
				l.succeeded()
			}
			return c, nil
		}
		select {
		case <-l.stop:
			return nil, net.ErrClosed
		default:
		}
		if errors.Is(err, net.ErrClosed) {
			return nil, err
		}
		l.report(err, wait)
		select {
		case <-l.stop:
			return nil, net.ErrClosed
		case <-time.After(wait):
		}
	}
}

func (l *patientListener) report(err error, wait time.Duration) {
	now := time.Now()
	l.failed.Add(1)
	l.mu.Lock()
	if l.since.IsZero() {
		l.since = now
	}
	l.last, l.reason = now, err.Error()
	l.mu.Unlock()
	if hidden, ok := l.lines.Allow(now); ok {
		l.log.Error().Err(err).Str("listener", l.name).Dur("wait_ms", wait).Uint64("hidden", hidden).
			Msg("a connection could not be accepted: new connections wait, open ones are served")
	}
}

func (l *patientListener) succeeded() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.since = time.Time{}
}

// problem returns why connections are not accepted now; empty if they are. If the last
// failure is longer ago than any pause, Accept has tried again, and waits for a client.
func (l *patientListener) problem() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.since.IsZero() || l.last.Sub(l.since) < acceptBlip || time.Since(l.last) > 2*acceptWaitMost {
		return ""
	}
	return fmt.Sprintf("connections to the %s listener cannot be accepted: %s", l.name, l.reason)
}

// Close closes the socket of this process. It may be called again: only the first call
// returns an error.
func (l *patientListener) Close() (err error) {
	l.closed.Do(func() {
		close(l.stop)
		err = l.Listener.Close()
	})
	return err
}
