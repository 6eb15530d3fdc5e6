package server

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// adminServer is an Admin that serves on an address.
type adminServer struct {
	*Admin
	t    *testing.T
	addr string
}

func listenAdmin(t *testing.T, change func(*Admin)) *adminServer {
	t.Helper()
	_, a := newAdminSite(t, new(Records))
	if change != nil {
		change(a)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a.ln.Listener = ln
	ended := make(chan error, 1)
	go func() { ended <- a.Serve() }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := a.Shutdown(ctx); err != nil {
			t.Error(err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return &adminServer{a, t, ln.Addr().String()}
}

// send opens a connection and sends a request, or a part of one.
func (a *adminServer) send(raw string) (net.Conn, *bufio.Reader) {
	a.t.Helper()
	c, err := net.Dial("tcp", a.addr)
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	io.WriteString(c, raw)
	return c, bufio.NewReader(c)
}

func adminGet(path string) string { return "GET " + path + " HTTP/1.1\r\nHost: x\r\n\r\n" }

// TestAdminRefusesARequestWithABody without waiting for it, whatever is in its chunks.
func TestAdminRefusesARequestWithABody(t *testing.T) {
	a := listenAdmin(t, func(a *Admin) { a.http.ReadTimeout = 0 })
	for _, framing := range []string{"Content-Length: 10", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked\r\n\r\n5;\r\nhello\r\n0\r\n"} {
		for _, path := range []string{"/healthz", "/metrics", "/", "/nowhere"} {
			_, r := a.send("GET " + path + " HTTP/1.1\r\nHost: x\r\n" + framing + "\r\n\r\n")
			resp, err := http.ReadResponse(r, nil)
			if err != nil || !resp.Close || resp.StatusCode != http.StatusBadRequest {
				t.Errorf("%s with %s: got %v, %v, want 400 and the end", path, framing, resp, err)
				continue
			}
			if _, err := io.ReadAll(r); err != nil {
				t.Errorf("%s with %s: %v, want the end", path, framing, err)
			}
		}
	}
}

func TestAdminBoundsTheHeadersOfARequest(t *testing.T) {
	t.Parallel()
	a := listenAdmin(t, nil)
	_, r := a.send("GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("x", 2*adminMaxHeader))
	if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("got %v, %v", resp, err)
	}
}

// TestAdminKeepsRoomForAProbe beside connections that send nothing, or no end.
func TestAdminKeepsRoomForAProbe(t *testing.T) {
	const most = 4
	a := listenAdmin(t, func(a *Admin) { a.conns.max = most })
	for i := range 5 * most {
		a.send([]string{"", "GET /healthz HTTP/1.1\r\nHost", adminGet("/healthz")}[i%3])
	}
	_, r := a.send(adminGet("/healthz"))
	if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != 200 {
		t.Fatalf("got %v, %v", resp, err)
	}
	if open, ended := a.conns.stats(); open > most || ended < 4*most {
		t.Errorf("%d open, %d ended, want %d at most, and %d or more", open, ended, most, 4*most)
	}
}

// TestAdminEndsClientsThatDoNotRead: of 200 answers to pipelined requests none is
// taken.
func TestAdminEndsClientsThatDoNotRead(t *testing.T) {
	t.Parallel()
	ended := make(chan struct{})
	a := listenAdmin(t, func(a *Admin) {
		a.http.WriteTimeout = time.Second
		a.http.ConnState = func(c net.Conn, state http.ConnState) {
			a.conns.changed(c, state)
			if state == http.StateClosed {
				close(ended)
			}
		}
	})
	a.send(strings.Repeat(adminGet("/metrics"), 200))
	select {
	case <-ended:
	case <-time.After(patience):
		t.Fatal("the connection is held")
	}
	if open, _ := a.conns.stats(); open != 0 {
		t.Errorf("%d connections are counted as open", open)
	}
}

// TestLongAnswersOutlastTheDeadlines: a profile goes on.
func TestLongAnswersOutlastTheDeadlines(t *testing.T) {
	t.Parallel()
	a := listenAdmin(t, func(a *Admin) {
		a.http.ReadTimeout, a.http.ReadHeaderTimeout, a.http.WriteTimeout = seldomSlow, seldomSlow, seldomSlow
	})
	began := time.Now()
	const long = seldomSlow + time.Second
	_, trace := a.send(adminGet(fmt.Sprint("/debug/pprof/trace?seconds=", long.Seconds())))
	resp, err := http.ReadResponse(trace, nil)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("trace: got %v, %v", resp, err)
	}
	if _, err := io.Copy(io.Discard, resp.Body); err != nil || time.Since(began) < long {
		t.Errorf("trace: ended after %v, %v, want %v", time.Since(began), err, long)
	}
}

// TestOpenAdminRequestsDoNotDelayTheStop, of whatever kind they are. It runs beside no
// other test: a process makes one trace at a time.
func TestOpenAdminRequestsDoNotDelayTheStop(t *testing.T) {
	a := listenAdmin(t, nil)
	a.send("")
	a.send("GET /healthz HTTP/1.1\r\nHost")
	a.send(strings.Repeat(adminGet("/metrics"), 200))
	for _, path := range []string{"/debug/pprof/profile?seconds=3600", "/debug/pprof/trace?seconds=3600", "/debug/pprof/heap?seconds=3600"} {
		a.send(adminGet(path))
	}
	for start := time.Now(); len(a.profiles) < 3; time.Sleep(time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatal("the profiles are not being made")
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := a.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	if ctx.Err() != nil {
		t.Error("all the time for the stop was used")
	}
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		open, _ := a.conns.stats()
		if open == 0 {
			break
		}
		if time.Since(start) > patience {
			t.Fatalf("%d connections are open", open)
		}
	}
}
