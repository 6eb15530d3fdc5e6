package server

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"verve/internal/testproc"

	"github.com/rs/zerolog"
)

// acceptErrnos are the errors of accept(2) that pass: of the process, of the system,
// of the client, of the network.
var acceptErrnos = []syscall.Errno{
	syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM,
	syscall.ECONNABORTED, syscall.EINTR, syscall.EPERM,
	syscall.ENETDOWN, syscall.EPROTO, syscall.ENOPROTOOPT, syscall.EHOSTDOWN,
	syscall.EHOSTUNREACH, syscall.EOPNOTSUPP, syscall.ENETUNREACH, syscall.ETIMEDOUT,
}

// faulty is a listener whose next accepts fail with the errors in it.
type faulty struct {
	net.Listener
	mu   sync.Mutex
	next []error
	more bool // the last one stays
}

func (f *faulty) fail(more bool, errs ...error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.next, f.more = errs, more
}

func (f *faulty) Accept() (net.Conn, error) {
	f.mu.Lock()
	if len(f.next) > 0 {
		err := f.next[0]
		if len(f.next) > 1 || !f.more {
			f.next = f.next[1:]
		}
		f.mu.Unlock()
		return nil, err
	}
	f.mu.Unlock()
	return f.Listener.Accept()
}

func acceptError(errno syscall.Errno) error {
	return &net.OpError{Op: "accept", Net: "tcp", Err: os.NewSyscallError("accept4", errno)}
}

func newFaulty(t *testing.T) *faulty {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return &faulty{Listener: ln}
}

// TestListenersOutliveEveryErrorOfAccept: the next accept succeeds, and every failure
// is counted.
func TestListenersOutliveEveryErrorOfAccept(t *testing.T) {
	t.Parallel()
	for _, errno := range acceptErrnos {
		ln := newFaulty(t)
		l := newPatientListener(ln, "public", zerolog.Nop())
		ln.fail(false, acceptError(errno), acceptError(errno), acceptError(errno))
		dialled, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		c, err := l.Accept()
		if err != nil {
			t.Errorf("%v: got %v, want a connection", errno, err)
		} else {
			c.Close()
		}
		if n := l.failed.Load(); n != 3 {
			t.Errorf("%v: got %d failures counted, want 3", errno, n)
		}
		dialled.Close()
		l.Close()
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v: got %v of a closed listener", errno, err)
		}
	}
}

// TestCloseEndsTheWaitAfterAFailedAccept, which may be a second.
func TestCloseEndsTheWaitAfterAFailedAccept(t *testing.T) {
	ln := newFaulty(t)
	ln.fail(true, acceptError(syscall.EMFILE))
	l := newPatientListener(ln, "public", zerolog.Nop())
	ended := make(chan error, 1)
	go func() {
		_, err := l.Accept()
		ended <- err
	}()
	for l.failed.Load() < 3 {
		time.Sleep(time.Millisecond)
	}
	l.Close()
	select {
	case err := <-ended:
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("got %v", err)
		}
	case <-time.After(patience):
		t.Error("waits on")
	}
}

// TestOutOfDescriptorsIsReportedAndPasses: on both listeners connections that are open
// are served, new ones wait and are served in the end, /readyz and a metric say so, and
// the log has a line a second at most.
func TestOutOfDescriptorsIsReportedAndPasses(t *testing.T) {
	var log testproc.Buffer
	ln, adminLn := newFaulty(t), newFaulty(t)
	base := newSite(t, nil)
	cfg := base.cfg
	cfg.Log = zerolog.New(&log)
	s, err := New(cfg, ln)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 2)
	go func() { ended <- s.Serve() }()
	a := NewAdmin(AdminConfig{
		Listener: adminLn, Server: s, Times: NewTimes(), Records: func() Records { return Records{} }, Delivered: func(time.Time) string { return "" },
	})
	go func() { ended <- a.Serve() }()
	dial := func(to net.Listener) (net.Conn, *bufio.Reader) {
		c, err := net.Dial("tcp", to.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(patience))
		return c, bufio.NewReader(c)
	}
	ask := func(c net.Conn, r *bufio.Reader, request string) (int, string) {
		t.Helper()
		io.WriteString(c, request)
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b)
	}
	c, r := dial(ln)
	ask(c, r, get("id=1"))
	admin, adminR := dial(adminLn)
	ready := "GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"
	if code, body := ask(admin, adminR, ready); code != 200 {
		t.Fatalf("before: %d %s", code, body)
	}

	began := time.Now()
	ln.fail(true, acceptError(syscall.EMFILE))
	adminLn.fail(true, acceptError(syscall.EMFILE))
	for _, to := range []net.Listener{ln, adminLn} { // ends the accept that waits
		waker, _ := dial(to)
		waker.Close()
	}
	waiting, waitingR := dial(ln)
	io.WriteString(waiting, get("id=2"))
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		code, body := ask(admin, adminR, ready)
		if code == 503 && strings.Contains(body, `"server":{"ok":false,"reason":"connections to the public listener cannot be accepted: accept tcp: accept4: too many open files"}`) &&
			strings.Contains(body, `"admin":{"ok":false`) {
			break
		}
		if time.Since(start) > patience {
			t.Fatalf("out of descriptors: %d %s", code, body)
		}
	}
	if code, body := ask(c, r, get("id=3")); code != 200 {
		t.Errorf("the connection that is open: got %d %s", code, body)
	}
	page := getPage(a, "/metrics").Body.String()
	for _, name := range []string{"public", "admin"} {
		if strings.Contains(page, fmt.Sprintf("verve_accept_errors_total{listener=%q} 0\n", name)) || !strings.Contains(page, fmt.Sprintf("verve_accept_errors_total{listener=%q}", name)) {
			t.Errorf("the failures of the %s listener are not counted", name)
		}
	}
	ln.fail(false)
	adminLn.fail(false)
	resp, err := http.ReadResponse(waitingR, nil)
	if err != nil || resp.StatusCode != 200 {
		t.Errorf("the connection that waited: got %v, %v", resp, err)
	}
	eventually(t, "ready again", func() bool {
		code, _ := ask(admin, adminR, ready)
		return code == 200
	})
	if n, most := strings.Count(log.String(), "could not be accepted"), 2*int(2+time.Since(began)/time.Second); n < 2 || n > most {
		t.Errorf("got %d lines, want 2 to %d", n, most)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := errors.Join(s.Shutdown(ctx), a.Shutdown(ctx), <-ended, <-ended); err != nil {
		t.Error(err)
	}
}
