package server

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"verve/internal/testproc"
)

// proxies are those that people put in front, set to keep and share connections
// and to pass bodies on as they come, where requests are most easily confused.
// They give up on incomplete requests soon, see askThrough.
var proxies = []struct {
	name, config string
	args         []string // DIR is the directory of the configuration
}{
	{"nginx", `
daemon off; master_process off; pid DIR/pid; error_log DIR/log;
events { worker_connections 256; }
http {
	access_log off;
	client_body_temp_path DIR/body; proxy_temp_path DIR/proxy; fastcgi_temp_path DIR/fastcgi; uwsgi_temp_path DIR/uwsgi; scgi_temp_path DIR/scgi;
	client_body_timeout 100ms; client_header_timeout 100ms; keepalive_timeout 100ms; lingering_time 100ms; lingering_timeout 100ms;
	upstream verve { server SERVER; keepalive 1; }
	server {
		listen LISTEN;
		ignore_invalid_headers off; underscores_in_headers on; merge_slashes off;
		location / {
			proxy_pass http://verve; proxy_http_version 1.1; proxy_set_header Connection "";
			proxy_request_buffering off; proxy_buffering off;
		}
	}
}`, []string{"-e", "DIR/log", "-p", "DIR", "-c", "DIR/config"}},
	{"haproxy", `
global
	maxconn 256
defaults
	mode http
	timeout connect 5s
	timeout server 5s
	timeout client 100ms
	timeout http-request 100ms
	timeout http-keep-alive 100ms
	option accept-invalid-http-request
	http-reuse always
frontend public
	bind LISTEN
	default_backend verve
backend verve
	server one SERVER
`, []string{"-db", "-f", "DIR/config"}},
}

// startProxy starts the proxy in front of server, or skips, which
// VERVE_TEST_REQUIRE can forbid.
func startProxy(t *testing.T, name, config string, args []string, server string) (addr string) {
	t.Helper()
	exe := testproc.Needs(t, name, name)
	// Not under the test's directory: nginx started by root has its files
	// opened by another user.
	dir, err := os.MkdirTemp("", "verve-"+name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	addr = testproc.FreeAddr(t)
	in := strings.NewReplacer("DIR", dir, "SERVER", server, "LISTEN", addr)
	if err := os.WriteFile(filepath.Join(dir, "config"), []byte(in.Replace(config)), 0o644); err != nil {
		t.Fatal(err)
	}
	for i := range args {
		args[i] = in.Replace(args[i])
	}
	cmd := exec.Command(exe, args...)
	var out testproc.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = cmd.Wait() }() // the log tells why
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		<-ended
	})
	for start := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		if c, err := net.Dial("tcp", addr); err == nil {
			_ = c.Close()
			return addr
		}
		select {
		case <-ended:
			t.Fatalf("%s ended: %s", name, out.String())
		default:
		}
		if time.Since(start) > patience {
			t.Fatalf("%s does not listen: %s", name, out.String())
		}
	}
}

// handled counts the requests that were understood and routed, whatever their answer: each
// has exactly one. For a batch it counts the ids.
func (s *site) handled() uint64 {
	st := s.cfg.Counter.Stats()
	n := st.Unique + st.Repeats + s.sunk.Load()
	for r := range reasons {
		if r != reasonBadRequest && r != reasonTooLarge && r != reasonTooSlow {
			n += s.refused[r].Load()
		}
	}
	return n
}

// handledBy returns how many of those resp answers: none if it is of a proxy, or to
// something that was no request.
func handledBy(resp *http.Response, body string) uint64 {
	single := body == "ok" || body == "failed"
	switch {
	case resp.Header.Get("Content-Type") != "text/plain", resp.StatusCode == http.StatusRequestTimeout, resp.StatusCode == http.StatusRequestEntityTooLarge,
		resp.StatusCode == http.StatusRequestHeaderFieldsTooLarge, resp.Header.Get("Verve-Reason") == "bad-request":
		return 0
	case single:
		return 1
	case resp.StatusCode == http.StatusOK: // a word a line
		return uint64(strings.Count(body, "\n"))
	}
	return 0
}

// smugglingForms are requests with a second one hidden in them, which appears
// if two readers disagree about where the first ends.
func smugglingForms() map[string]string {
	forms := map[string]string{}
	const hidden = "GET /api/verve/accept?id=smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
	for i, te := range []string{
		"Transfer-Encoding: chunked", "Transfer-Encoding: Chunked", "transfer-encoding: chunked", "Transfer-Encoding: chunked, chunked",
		"Transfer-Encoding: identity", "Transfer-Encoding: identity, chunked", "Transfer-Encoding: chunked, identity", "Transfer-Encoding: xchunked",
		"Transfer-Encoding: gzip, chunked", "Transfer-Encoding: \"chunked\"", "Transfer-Encoding: chunked;q=1", "Transfer-Encoding: chunk", "Transfer-Encoding: ",
		"Transfer-Encoding:chunked", "Transfer-Encoding:\tchunked", "Transfer-Encoding: chunked\t", "Transfer-Encoding:  chunked ", "Transfer-Encoding:\vchunked",
		"Transfer-Encoding: \x0bchunked", "Transfer-Encoding : chunked", "Transfer-Encoding\t: chunked", "Transfer-Encoding:\r\n chunked", "Transfer-Encoding:\n chunked",
		"X: y\nTransfer-Encoding: chunked", "X: y\rTransfer-Encoding: chunked", " Transfer-Encoding: chunked", "Transfer_Encoding: chunked", "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
		"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked", "Transfer-Encoding: chunked\x00", "Transfer-Encoding: \xffchunked", "Transfer-Encoding: chunked,", "Transfer-Encoding: ,chunked",
		"Content-Encoding: chunked", "TE: chunked", "Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked", "Connection: Content-Length",
	} {
		name := fmt.Sprintf("encoding %d %q", i, te)
		chunks := "0\r\n\r\n" + hidden
		forms[name] = "POST /test HTTP/1.1\r\nHost: x\r\n" + te + "\r\n\r\n" + chunks
		forms[name+" before a length"] = fmt.Sprintf("POST /test HTTP/1.1\r\nHost: x\r\n%s\r\nContent-Length: %d\r\n\r\n%s", te, len(chunks), chunks)
		forms[name+" after a short length"] = fmt.Sprintf("POST /test HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n%s\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", te, len(hidden), hidden)
		forms[name+" on accept"] = fmt.Sprintf("GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\n%s\r\nContent-Length: %d\r\n\r\n%s", te, len(chunks), chunks)
		forms[name+" in 1.0"] = "POST /test HTTP/1.0\r\nHost: x\r\nConnection: keep-alive\r\n" + te + "\r\n\r\n" + chunks
	}
	for i, cl := range []string{
		"Content-Length: 0", "Content-Length: +0", "Content-Length: -0", "Content-Length: 00", "Content-Length: 0x0", "Content-Length: 0,0", "Content-Length: 0, 55",
		"Content-Length: 0\r\nContent-Length: 55", "Content-Length: 55\r\nContent-Length: 0", "Content-Length: 55\r\nContent-Length: 55", "Content-Length : 55", "Content-Length: 55 ",
		"Content-Length:55", "Content-Length: 5 5", "Content-Length: 5\r\n 5", "Content-Length: \r\n 55", "Content-Length: 18446744073709551616", "Content-Length: 18446744073709551671",
		"Content-Length: 4294967351", "Content-Length: 055", "Content-Length: 55\x00", "Content-Length: \v55", "Content-Length:", "content-length: 55", "CONTENT-LENGTH: 55",
		"Content-Length: 55.0", "Content-Length: 5e1", "Content_Length: 55", "X: y\nContent-Length: 55", "X: y\rContent-Length: 55",
	} {
		name := fmt.Sprintf("length %d %q", i, cl)
		forms[name] = "POST /test HTTP/1.1\r\nHost: x\r\n" + cl + "\r\n\r\n" + hidden
		forms[name+" on accept"] = "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\n" + cl + "\r\n\r\n" + hidden
		forms[name+" of OPTIONS"] = "OPTIONS /test HTTP/1.1\r\nHost: x\r\n" + cl + "\r\n\r\n" + hidden
	}
	for i, chunks := range []string{
		"0\n\n", "0\r\n\n", "0\n\r\n", "0\r\n\r\n", "00000\r\n\r\n", "0;x\r\n\r\n", "0;x\n\r\n", "0;\r\n\r\n", "0 \r\n\r\n", " 0\r\n\r\n", "0x0\r\n\r\n", "+0\r\n\r\n", "-0\r\n\r\n", "\r\n0\r\n\r\n", "0\r\nX: y\r\n\r\n",
		"0\r\nContent-Length: 55\r\n\r\n", "0\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\nx0\r\n\r\n", "1\r\nx\n0\r\n\r\n", "1\r\nxy\r\n0\r\n\r\n", "2\r\nx\r\n0\r\n\r\n", "10000000000000000\r\n", "fffffffffffffff0\r\n", "g\r\n\r\n", "\r\n\r\n", "0\r\r\n\r\n", "0_0\r\n\r\n",
		"1;a=\"\r\n\"\r\nx\r\n0\r\n\r\n", "1;\nx\r\n0\r\n\r\n",
	} {
		forms[fmt.Sprintf("chunks %d %q", i, chunks)] = "POST /test HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + hidden
		forms[fmt.Sprintf("chunks of a batch %d %q", i, chunks)] = "POST /api/verve/accept HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + hidden
	}
	for i, line := range []string{
		"GET /api/verve/accept?id=1 HTTP/1.1\r\n\r\n", "GET /api/verve/accept?id=1  HTTP/1.1\r\nHost: x\r\n\r\n", "GET\t/api/verve/accept?id=1\tHTTP/1.1\r\nHost: x\r\n\r\n",
		"GET /api/verve/accept?id=1 HTTP/1.1\nHost: x\n\n", "GET /api/verve/accept?id=1 HTTP/1.1\rHost: x\r\r", "GET /api/verve/accept?id=1\r\n", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\n\n",
		"GET http://y/api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\n\r\n", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", "GET /api/verve/accept?id=1 HTTP/2.0\r\nHost: x\r\n\r\n",
		"GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nConnection: Close, Host\r\n\r\n",
		"GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", "GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n",
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HEAD /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\n\r\n", "CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
		"POST /test HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 55\r\n\r\n",
	} {
		forms[fmt.Sprintf("line %d %q", i, line)] = line + hidden
	}
	return forms
}

// TestProxiesAndWeAgreeWhereRequestsEnd sends each form of smuggling, and each
// row of the cases, through real proxies that share their connections to the
// server. Nobody may be answered a request of another's, and there are as many
// answers as requests.
func TestProxiesAndWeAgreeWhereRequestsEnd(t *testing.T) {
	t.Parallel()
	forms := smugglingForms()
	for _, row := range httpCases(t) {
		if row.raw != "" {
			forms["case "+row.name] = row.raw
		}
	}
	for _, p := range proxies {
		t.Run(p.name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, nil)
			proxy := startProxy(t, p.name, p.config, slices.Clone(p.args), s.addr)
			n := 0
			for name, raw := range forms {
				n++
				before := s.handled()
				answered := through(t, proxy, name, raw)
				// Whoever comes next on the shared connection gets his own answer.
				id := fmt.Sprintf("%s-%d", p.name, n)
				for _, want := range []int{200, 409} {
					resp, body, err := askThrough(proxy, get("id="+id))
					if err != nil || resp.StatusCode != want {
						t.Fatalf("after %s, %.200q: got %v %q, %v, want %d: the answers are out of step", name, raw, resp, body, err, want)
					}
				}
				if got := s.handled() - before; got != answered+2 {
					t.Errorf("%s, %.300q: %d requests were handled, %d answered", name, raw, got-2, answered)
				}
			}
		})
	}
}

// through sends raw and one plain request behind it on a connection to a proxy,
// and returns how many answers of the server came back.
func through(t *testing.T, proxy, name, raw string) (answered uint64) {
	t.Helper()
	c, err := net.Dial("tcp", proxy)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	var writing sync.WaitGroup
	defer writing.Wait()
	defer c.Close()
	writing.Go(func() {
		_, _ = io.WriteString(c, raw+"GET /api/verve/accept?id=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n") // may be refused before its end
	})
	r := bufio.NewReader(c)
	method := http.MethodGet
	if m, _, _ := strings.Cut(raw, " "); m == http.MethodHead {
		method = m
	}
	for {
		if b, _ := r.Peek(5); len(b) > 0 && string(b) != "HTTP/" {
			// nginx answers HTTP/0.9 in kind: a body, and the end.
			if rest, _ := io.ReadAll(r); string(rest) == "ok" || string(rest) == "failed" {
				answered++
			}
			return answered
		}
		resp, err := http.ReadResponse(r, &http.Request{Method: method})
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s, %.200q: the connection hangs", name, raw)
			}
			return answered
		}
		body, _ := io.ReadAll(resp.Body) // what is missing shows in what follows
		if method == http.MethodHead && resp.Header.Get("Verve-Reason") == "method" {
			answered++ // and has no body
			method = http.MethodGet
		} else {
			answered += handledBy(resp, string(body))
		}
	}
}

// askThrough sends one request through a proxy, again if the client was so slow, on a busy
// machine, that the proxy gave up before it had the request.
func askThrough(proxy, raw string) (resp *http.Response, body string, err error) {
	for start := time.Now(); time.Since(start) < patience; {
		resp, body, err = askAt(proxy, raw)
		gaveUp := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) ||
			err == nil && resp.StatusCode == http.StatusRequestTimeout && handledBy(resp, body) == 0
		if !gaveUp {
			break
		}
	}
	return resp, body, err
}

// askAt sends one request on a connection of its own.
func askAt(addr, raw string) (*http.Response, string, error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, raw); err != nil {
		return nil, "", err
	}
	return answer(bufio.NewReader(c))
}
