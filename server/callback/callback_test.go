package callback

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"verve/internal/testproc"
)

// patience is how long a test waits for what must happen; no assertion
// depends on how soon it does.
const patience = time.Minute

const sinkPath = "/test"

// startCallbacks runs Sender until the test ends, and checks then that no
// goroutine is left and every Send has been accounted for.
func startCallbacks(t *testing.T, cfg Config) *Sender {
	t.Helper()
	current := goleak.IgnoreCurrent()
	t.Cleanup(func() {
		var left error
		for start := time.Now(); time.Since(start) < patience; { // the receivers' end a moment later
			if left = goleak.Find(current); left == nil {
				return
			}
		}
		t.Error(left)
	})
	cfg.Timeout = cmp.Or(cfg.Timeout, patience) // a busy machine is no slow receiver
	if cfg.Live == nil {
		cfg.Live = func() (time.Time, uint64) { return time.Unix(0, 0), 1 }
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	run(t, c)
	return c
}

func run(t *testing.T, c *Sender) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
}

// send does what the request handler does for a new id.
func send(t testing.TB, c *Sender, url string) {
	t.Helper()
	ep, err := c.Parse([]byte(url))
	if err != nil {
		t.Fatal(err)
	}
	if !c.Reserve(ep) {
		t.Fatalf("no place for %s", url)
	}
	c.Send(ep)
}

func await(t testing.TB, c *Sender, what string, cond func(Stats) bool) Stats {
	t.Helper()
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		s := c.Stats()
		if cond(s) {
			return s
		}
		if time.Since(start) > patience {
			t.Fatalf("waited in vain for %s: %+v", what, s)
		}
	}
}

// sends returns the number of Sends that s accounts for.
func sends(s Stats) uint64 {
	n := uint64(s.Waiting) + uint64(s.InFlight)
	for _, ended := range s.Ended {
		n += ended
	}
	return n
}

func failed(s Stats) (n uint64) {
	for _, ended := range s.Ended[FailedStatus:] {
		n += ended
	}
	return n
}

// receiver is an HTTP server that a test's callbacks go to.
func receiver(t testing.TB, handler http.HandlerFunc) (url, hostport string) {
	t.Helper()
	s := httptest.NewServer(handler)
	t.Cleanup(s.Close)
	return s.URL, s.Listener.Addr().String()
}

// rawReceiver serves each connection by serve, in a goroutine of its own, and
// closes it after.
func rawReceiver(t testing.TB, serve func(conn net.Conn, r *bufio.Reader)) (url, hostport string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	var conns []net.Conn
	wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns = append(conns, conn)
			mu.Unlock()
			wg.Go(func() {
				defer conn.Close()
				serve(conn, bufio.NewReader(conn))
			})
		}
	})
	t.Cleanup(func() {
		_ = ln.Close()
		mu.Lock()
		for _, conn := range conns {
			_ = conn.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	return "http://" + ln.Addr().String(), ln.Addr().String()
}

// newGate returns a channel on which a receiver waits, and what opens it. It
// is opened at the end of the test in any case: a receiver does not close
// before its handlers have returned.
func newGate() (gate <-chan struct{}, open func()) {
	ch := make(chan struct{})
	return ch, sync.OnceFunc(func() { close(ch) })
}

// readPOST reads a request to its end.
func readPOST(r *bufio.Reader) (*http.Request, error) {
	req, err := http.ReadRequest(r)
	if err == nil {
		_, err = io.Copy(io.Discard, req.Body)
	}
	return req, err
}

const okAnswer = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

func TestCallbackRequestIsExact(t *testing.T) {
	wire := make(chan string, 1)
	url, hostport := rawReceiver(t, func(conn net.Conn, r *bufio.Reader) {
		var raw strings.Builder
		_, _ = readPOST(bufio.NewReader(io.TeeReader(r, &raw)))
		wire <- raw.String()
		_, _ = io.WriteString(conn, okAnswer)
	})
	c := startCallbacks(t, Config{
		Allow: []string{hostport}, Group: "verve", Instance: "host-1",
		Live: func() (time.Time, uint64) {
			return time.Date(2026, 11, 22, 7, 36, 0, 0, time.FixedZone("", 3600)), 48211
		},
	})
	send(t, c, url+"//a/../%0d%0aX:%201?q=%20a+b&u=http://x/?")
	want := "POST //a/../%0d%0aX:%201?q=%20a+b&u=http://x/? HTTP/1.1\r\n" +
		"User-Agent: verve\r\nHost: " + hostport + "\r\nContent-Type: application/json\r\nContent-Length: 89\r\nVerve-Callback: 1\r\n\r\n" +
		`{"window_start":"2026-11-22T06:36:00Z","unique":48211,"group":"verve","instance":"host-1"}`
	want = strings.Replace(want, "Content-Length: 89", fmt.Sprintf("Content-Length: %d", len(want)-strings.Index(want, "{")), 1)
	if got := <-wire; got != want {
		t.Fatalf("request\n%q, want\n%q", got, want)
	}
	await(t, c, "delivery", func(s Stats) bool { return s.Ended[Delivered] == 1 })
}

func TestCallbackBodyIsJSONForAnyName(t *testing.T) {
	for _, tc := range []struct{ group, start string }{
		{`a"b\c`, "2026-11-22T06:36:00.05Z"},
		{"\n\x01<&>", "2026-11-22T06:36:00.000000001Z"},
		{"ü€𝄞\u2028", "2026-11-22T06:36:00Z"},
	} {
		start, _ := time.Parse(time.RFC3339Nano, tc.start)
		c, err := New(Config{Group: tc.group, Instance: tc.group + "'", Live: func() (time.Time, uint64) { return start, 1<<64 - 1 }})
		if err != nil {
			t.Fatal(err)
		}
		body := c.body()
		var got struct {
			WindowStart string `json:"window_start"`
			Unique      uint64 `json:"unique"`
			Group       string `json:"group"`
			Instance    string `json:"instance"`
		}
		if err := json.Unmarshal(body, &got); err != nil {
			t.Fatalf("%s: %v", body, err)
		}
		if got.WindowStart != tc.start || got.Unique != 1<<64-1 || got.Group != tc.group || got.Instance != tc.group+"'" {
			t.Errorf("body %s of %q", body, tc.group)
		}
	}
}

func TestCallbackMergesWhatWaitsForTheSameEndpoint(t *testing.T) {
	gate, open := newGate()
	var live atomic.Uint64
	bodies := make(chan string, 10)
	url, hostport := receiver(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		bodies <- string(body)
		<-gate
	})
	c := startCallbacks(t, Config{
		Allow: []string{hostport}, Concurrency: 1,
		Live: func() (time.Time, uint64) { return time.Unix(0, 0), live.Load() },
	})
	t.Cleanup(open)
	live.Store(1)
	send(t, c, url+"/x")
	first := <-bodies
	for n := range uint64(100) {
		live.Store(2 + n)
		send(t, c, url+"/x")
	}
	if s := c.Stats(); s.Ended[Merged] != 99 || s.Waiting != 1 || s.InFlight != 1 {
		t.Fatalf("stats %+v", s)
	}
	open()
	second := <-bodies
	if !strings.Contains(first, `"unique":1,`) || !strings.Contains(second, `"unique":101,`) {
		t.Fatalf("bodies %s, %s", first, second)
	}
	s := await(t, c, "delivery", func(s Stats) bool { return s.Ended[Delivered] == 2 })
	if sends(s) != 101 || s.Reserved != 0 {
		t.Fatalf("stats %+v", s)
	}
}

func TestCallbackConcurrencyIsPerDestination(t *testing.T) {
	const limit, posts = 3, 12
	type busy struct{ now, most int }
	var mu sync.Mutex
	load := map[string]*busy{}
	gate, open := newGate()
	handler := func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		b := load[r.Host]
		if b == nil {
			b = &busy{}
			load[r.Host] = b
		}
		b.now++
		b.most = max(b.most, b.now)
		mu.Unlock()
		<-gate
		mu.Lock()
		b.now--
		mu.Unlock()
	}
	url1, hostport1 := receiver(t, handler)
	url2, hostport2 := receiver(t, handler)
	c := startCallbacks(t, Config{Allow: []string{hostport1, hostport2}, Concurrency: limit})
	t.Cleanup(open)
	for n := range posts {
		send(t, c, fmt.Sprintf("%s/%d", url1, n))
		send(t, c, fmt.Sprintf("%s/%d", url2, n))
	}
	await(t, c, "both at their limit", func(Stats) bool {
		mu.Lock()
		defer mu.Unlock()
		return load[hostport1] != nil && load[hostport2] != nil && load[hostport1].now == limit && load[hostport2].now == limit
	})
	if s := c.Stats(); s.InFlight != 2*limit || s.Waiting != 2*(posts-limit) {
		t.Fatalf("stats %+v", s)
	}
	open()
	await(t, c, "delivery", func(s Stats) bool { return s.Ended[Delivered] == 2*posts })
	if load[hostport1].most != limit || load[hostport2].most != limit {
		t.Fatalf("most in flight: %+v, %+v", load[hostport1], load[hostport2])
	}
}

func TestCallbackRateHoldsForDestinationsNotListed(t *testing.T) {
	const rate, posts = 100, 30
	var mu sync.Mutex
	var arrived []time.Time
	url, hostport := receiver(t, func(http.ResponseWriter, *http.Request) {
		mu.Lock()
		arrived = append(arrived, time.Now())
		mu.Unlock()
	})
	// The own sink is subject to the rate as public destinations are.
	c := startCallbacks(t, Config{SelfAddr: netip.MustParseAddrPort(hostport), SelfPath: sinkPath, Rate: rate})
	began := time.Now() // and not when the first arrived, which may be late
	for n := range posts {
		send(t, c, fmt.Sprintf("%s/test?%d", url, n))
	}
	await(t, c, "delivery", func(s Stats) bool { return s.Ended[Delivered] == posts })
	mu.Lock()
	defer mu.Unlock()
	// The one that makes up for a late wake-up comes on top of the first.
	if took, least := arrived[posts-1].Sub(began), (posts-2)*time.Second/rate; took < least {
		t.Errorf("%d POSTs in %v, want at least %v", posts, took, least)
	}
}

func TestCallbackRateSparesListedDestinations(t *testing.T) {
	const posts = 100
	url, hostport := receiver(t, func(http.ResponseWriter, *http.Request) {})
	c := startCallbacks(t, Config{Allow: []string{hostport}, Rate: 0.001})
	for n := range posts {
		send(t, c, fmt.Sprintf("%s/%d", url, n))
	}
	await(t, c, "delivery", func(s Stats) bool { return s.Ended[Delivered] == posts })
}

func TestCallbackFullTableRefusesBeforeAnythingIsCounted(t *testing.T) {
	c, err := New(Config{
		Allow: []string{"a.lan:1", "b.lan:1"}, maxWaiting: 4, maxWaitingPerDestination: 2,
		Live: func() (time.Time, uint64) { return time.Time{}, 0 },
	})
	if err != nil {
		t.Fatal(err)
	}
	parse := func(url string) Endpoint {
		ep, err := c.Parse([]byte(url))
		if err != nil {
			t.Fatal(err)
		}
		return ep
	}
	reserve := func(url string, want bool) {
		t.Helper()
		if got := c.Reserve(parse(url)); got != want {
			t.Fatalf("Reserve(%s) = %v, want %v", url, got, want)
		}
	}
	reserve("http://a.lan:1/1", true)
	reserve("http://a.lan:1/2", true)
	reserve("http://a.lan:1/3", false) // the destination's share
	reserve("http://A.lan.:1/2", true) // has a place already
	reserve("http://b.lan:1/1", true)
	reserve("http://b.lan:1/2", true)
	reserve("http://b.lan:1/1", true)
	reserve("http://c.example.com/", false) // full
	c.Release(parse("http://a.lan:1/2"))
	reserve("http://a.lan:1/3", false) // still reserved by the other one
	c.Release(parse("http://a.lan:1/2"))
	reserve("http://a.lan:1/3", true)
	c.Send(parse("http://a.lan:1/3"))
	c.Release(parse("http://b.lan:1/2"))
	c.Release(parse("http://b.lan:1/1"))
	c.Release(parse("http://b.lan:1/1"))
	c.Release(parse("http://a.lan:1/1"))
	s := c.Stats()
	if s.Reserved != 1 || s.Waiting != 1 || s.Destinations != 1 || sends(s) != 1 {
		t.Fatalf("stats %+v", s)
	}
}

func TestCallbackNewcomersLeaveAQuarterOfTheTable(t *testing.T) {
	c, err := New(Config{
		Allow: []string{"a.lan:1"}, maxWaiting: 8, Live: func() (time.Time, uint64) { return time.Time{}, 0 },
	})
	if err != nil {
		t.Fatal(err)
	}
	for n := range 6 {
		send(t, c, fmt.Sprintf("http://h%d.example.com/", n))
	}
	ep, _ := c.Parse([]byte("http://h6.example.com/"))
	if c.Reserve(ep) {
		t.Fatal("newcomers fill the table")
	}
	send(t, c, "http://a.lan:1/")
}

func TestCallbackTarpitHoldsUpNobodyElse(t *testing.T) {
	const others, posts = 19, 25
	var trapped atomic.Int64
	tarpit, tarpitAddr := rawReceiver(t, func(_ net.Conn, r *bufio.Reader) {
		_, _ = readPOST(r)
		trapped.Add(1)
		_, _ = r.ReadByte() // never answers
	})
	allow, urls := []string{tarpitAddr}, []string{}
	for range others {
		url, hostport := receiver(t, func(http.ResponseWriter, *http.Request) {})
		allow, urls = append(allow, hostport), append(urls, url)
	}
	c := startCallbacks(t, Config{Allow: allow, Concurrency: 4, workers: 5, Timeout: time.Hour})
	for n := range posts {
		send(t, c, fmt.Sprintf("%s/%d", tarpit, n))
	}
	await(t, c, "a full tarpit", func(Stats) bool { return trapped.Load() == 4 })
	for n := range posts {
		for _, url := range urls {
			send(t, c, fmt.Sprintf("%s/%d", url, n))
		}
	}
	s := await(t, c, "the others", func(s Stats) bool { return s.Ended[Delivered] == others*posts })
	if s.InFlight != 4 || s.Waiting != posts-4 || failed(s) != 0 {
		t.Fatalf("tarpit is not held at its limit: %+v", s)
	}
}

// Names cost nothing, and so do the addresses of an allowed network: any number of tarpits
// leaves workers and places to the destinations that have answered.
func TestCallbackManyTarpitsLeaveRoomForProvenDestinations(t *testing.T) {
	for _, tarpit := range []string{"http://tarpit%d.example.com:%s/", "http://127.0.1.%d:%s/"} {
		t.Run(tarpit, func(t *testing.T) { manyTarpitsLeaveRoom(t, tarpit) })
	}
}

func manyTarpitsLeaveRoom(t *testing.T, tarpit string) {
	const tarpits, posts = 40, 50
	var mu sync.Mutex
	var delivered []string
	_, hostport := rawReceiver(t, func(conn net.Conn, r *bufio.Reader) {
		for {
			req, err := readPOST(r)
			if err != nil {
				return
			}
			if !strings.HasPrefix(req.Host, "good.") {
				_, _ = r.ReadByte()
				return
			}
			mu.Lock()
			delivered = append(delivered, req.URL.Path)
			mu.Unlock()
			_, _ = io.WriteString(conn, okAnswer)
		}
	})
	_, resolver := newNameServer(t, func(string, int64) []netip.Addr { return addrs("127.0.0.1") })
	_, port, _ := net.SplitHostPort(hostport)
	c := startCallbacks(t, Config{
		Allow: []string{"127.0.0.0/8:" + port}, Resolver: resolver, Rate: 1e6, Timeout: time.Hour,
		workers: 8, Concurrency: 2, maxWaiting: 40, maxWaitingPerDestination: 10,
		Connect: func(ctx context.Context, d *net.Dialer, _ string) (net.Conn, error) {
			return d.DialContext(ctx, "tcp", hostport)
		},
	})
	send(t, c, "http://good.example.com:"+port+"/first")
	await(t, c, "proof", func(s Stats) bool { return s.Ended[Delivered] == 1 })
	refused := 0
	for n := range tarpits {
		ep, _ := c.Parse(fmt.Appendf(nil, tarpit, n, port))
		if !c.Reserve(ep) {
			refused++
			continue
		}
		c.Send(ep)
	}
	await(t, c, "tarpits to hold their share", func(s Stats) bool { return s.InFlight == 6 })
	if s := c.Stats(); refused == 0 || s.Reserved > 30 {
		t.Fatalf("tarpits filled the table: %d refused, %+v", refused, s)
	}
	for n := range posts {
		send(t, c, fmt.Sprintf("http://good.example.com:%s/%d", port, n))
		await(t, c, "the proven destination", func(s Stats) bool { return s.Ended[Delivered] == uint64(n)+2 })
	}
	if s := c.Stats(); s.InFlight != 6 || len(delivered) != posts+1 {
		t.Fatalf("delivered %d, %+v", len(delivered), s)
	}
}

// A destination that the operator names is taken for one that answers quickly, until it does
// not: then it leaves workers to the others.
func TestCallbackNamedDestinationThatFailsLeavesRoom(t *testing.T) {
	gate, open := newGate()
	var first atomic.Bool
	first.Store(true)
	slow, slowAddr := receiver(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusInternalServerError)
		if !first.Swap(false) {
			<-gate
		}
	})
	quick, quickAddr := receiver(t, func(http.ResponseWriter, *http.Request) {})
	c := startCallbacks(t, Config{Allow: []string{slowAddr, quickAddr}, Concurrency: 4, workers: 4})
	t.Cleanup(open)
	send(t, c, slow)
	await(t, c, "a failure", func(s Stats) bool { return s.Ended[FailedStatus] == 1 })
	for n := range 4 {
		send(t, c, fmt.Sprintf("%s/%d", slow, n))
	}
	await(t, c, "the share of those that do not answer quickly", func(s Stats) bool { return s.InFlight == 3 })
	send(t, c, quick)
	await(t, c, "the other destination", func(s Stats) bool { return s.Ended[Delivered] == 1 })
}

// Connections, those without a POST among them, leave most descriptors to others.
func TestCallbackKeepsToItsShareOfTheDescriptors(t *testing.T) {
	const descriptors, destinations = 400, 100
	var logged testproc.Buffer
	gate, open := newGate()
	_, hostport := receiver(t, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			<-gate
		}
	})
	_, port, _ := net.SplitHostPort(hostport)
	var conns, most atomic.Int64
	c := startCallbacks(t, Config{
		Allow: []string{"127.0.0.0/8:" + port}, Descriptors: descriptors, Log: zerolog.New(&logged),
		Connect: func(ctx context.Context, d *net.Dialer, _ string) (net.Conn, error) {
			now := conns.Add(1)
			for was := most.Load(); now > was && !most.CompareAndSwap(was, now); was = most.Load() {
			}
			conn, err := d.DialContext(ctx, "tcp", hostport)
			return closeFunc{conn, func() { conns.Add(-1) }}, err
		},
	})
	t.Cleanup(open)
	if !strings.Contains(logged.String(), `"callback_concurrency":8,"lowered_to":4,"reason":"the process may open 400 files`) {
		t.Errorf("the log does not have what was lowered: %s", logged.String())
	}
	for n := range destinations {
		send(t, c, fmt.Sprintf("http://127.0.1.%d:%s/", n, port))
	}
	await(t, c, "delivery", func(s Stats) bool { return s.Ended[Delivered] == destinations })
	for n := range destinations {
		send(t, c, fmt.Sprintf("http://127.0.2.%d:%s/slow", n, port))
		send(t, c, fmt.Sprintf("http://127.0.1.%d:%s/slow", n, port))
	}
	await(t, c, "as many POSTs as may be in flight", func(s Stats) bool { return s.InFlight == descriptors/DescriptorShare/3 })
	open()
	await(t, c, "delivery", func(s Stats) bool { return s.Ended[Delivered] == 3*destinations })
	if n := most.Load(); n > descriptors/DescriptorShare*2/3 {
		t.Errorf("%d connections, and of %d descriptors callbacks have %d, a third of them to resolve names", n, descriptors, descriptors/DescriptorShare)
	}
}

func TestCallbackRedirectIsNotFollowed(t *testing.T) {
	var followed atomic.Int64
	trap, trapAddr := receiver(t, func(http.ResponseWriter, *http.Request) { followed.Add(1) })
	for _, status := range []int{301, 302, 303, 307, 308} {
		t.Run(strconv.Itoa(status), func(t *testing.T) {
			url, hostport := receiver(t, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/" {
					followed.Add(1)
				}
				w.Header().Set("Location", trap+"/x")
				w.WriteHeader(status)
			})
			c := startCallbacks(t, Config{Allow: []string{hostport, trapAddr}})
			send(t, c, url)
			s := await(t, c, "an end", func(s Stats) bool { return s.InFlight+s.Waiting == 0 })
			if s.Ended[FailedRedirect] != 1 {
				t.Errorf("%+v", s)
			}
		})
	}
	if n := followed.Load(); n != 0 {
		t.Fatalf("%d redirects followed", n)
	}
}

// forever writes s until the connection is closed.
func forever(conn net.Conn, s string) {
	chunk := strings.Repeat(s, 1+4096/len(s))
	for {
		if _, err := io.WriteString(conn, chunk); err != nil {
			return
		}
	}
}

// drip writes s byte by byte, each long before the last could time out.
func drip(conn net.Conn, s string) {
	for i := 0; ; i++ {
		if _, err := io.WriteString(conn, s[i%len(s):i%len(s)+1]); err != nil {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestCallbackHostileAnswersAreBounded(t *testing.T) {
	const head = "HTTP/1.1 200 OK\r\n"
	for _, tc := range []struct {
		name   string
		answer func(net.Conn)
		failed Result
	}{
		{"ten gigabytes", func(conn net.Conn) {
			_, _ = io.WriteString(conn, head+"Content-Length: 10737418240\r\n\r\n")
			forever(conn, "x")
		}, FailedAnswer},
		{"endless chunks", func(conn net.Conn) {
			_, _ = io.WriteString(conn, head+"Transfer-Encoding: chunked\r\n\r\n")
			forever(conn, "4\r\nxxxx\r\n")
		}, FailedAnswer},
		{"one huge chunk", func(conn net.Conn) {
			_, _ = io.WriteString(conn, head+"Transfer-Encoding: chunked\r\n\r\n7fffffff\r\n")
			forever(conn, "x")
		}, FailedAnswer},
		{"endless body to the close", func(conn net.Conn) {
			_, _ = io.WriteString(conn, head+"Connection: close\r\n\r\n")
			forever(conn, "x")
		}, FailedAnswer},
		{"endless trailer", func(conn net.Conn) {
			_, _ = io.WriteString(conn, head+"Transfer-Encoding: chunked\r\nTrailer: X\r\n\r\n0\r\n")
			forever(conn, "X: y\r\n")
		}, FailedAnswer},
		{"endless headers", func(conn net.Conn) {
			_, _ = io.WriteString(conn, head)
			forever(conn, "X: y\r\n")
		}, FailedAnswer},
		{"endless status line", func(conn net.Conn) { forever(conn, "H") }, FailedAnswer},
		{"endless 100", func(conn net.Conn) { forever(conn, "HTTP/1.1 100 Continue\r\n\r\n") }, FailedAnswer},
		{"endless 103", func(conn net.Conn) { forever(conn, "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n") }, FailedAnswer},
		{"dripping 1xx", func(conn net.Conn) { drip(conn, "HTTP/1.1 100 Continue\r\n\r\n") }, FailedTimeout},
		{"another protocol", func(conn net.Conn) {
			_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n")
			forever(conn, "x")
		}, FailedStatus},
		{"dripping body", func(conn net.Conn) {
			_, _ = io.WriteString(conn, head+"Content-Length: 60000\r\n\r\n")
			drip(conn, "x")
		}, FailedTimeout},
		{"dripping header", func(conn net.Conn) { drip(conn, head+strings.Repeat("X: y\r\n", 1000)) }, FailedTimeout},
		{"silence", func(conn net.Conn) { _, _ = conn.Read(make([]byte, 1)) }, FailedTimeout},
		{"not HTTP", func(conn net.Conn) { _, _ = io.WriteString(conn, "220 mail ESMTP\r\n\r\n") }, FailedAnswer},
		{"cut short", func(conn net.Conn) { _, _ = io.WriteString(conn, head+"Content-Length: 5\r\n\r\nok") }, FailedAnswer},
		{"close at once", func(net.Conn) {}, FailedAnswer},
		{"an error", func(conn net.Conn) {
			_, _ = io.WriteString(conn, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
		}, FailedStatus},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var posts atomic.Int64
			closed := make(chan struct{})
			url, hostport := rawReceiver(t, func(conn net.Conn, r *bufio.Reader) {
				_, _ = readPOST(r)
				if posts.Add(1) == 1 {
					defer close(closed)
				}
				tc.answer(conn)
			})
			timeout := patience
			if tc.failed == FailedTimeout {
				timeout = 200 * time.Millisecond
			}
			c := startCallbacks(t, Config{Allow: []string{hostport}, Timeout: timeout})
			send(t, c, url)
			s := await(t, c, "an end", func(s Stats) bool { return s.InFlight+s.Waiting == 0 })
			if s.Ended[tc.failed] != 1 || sends(s) != 1 || s.Retried != 0 {
				t.Errorf("stats %+v", s)
			}
			// The receiver writes until its connection is closed: it was.
			select {
			case <-closed:
			case <-time.After(patience):
				t.Error("connection is still open")
			}
			if n := posts.Load(); n != 1 {
				t.Errorf("%d POSTs, want 1: a fresh connection is no reason to try again", n)
			}
		})
	}
}

// TestCallbackCompressedAnswerIsNotUnpacked: it is counted as it came, and
// nothing in it is looked at.
func TestCallbackCompressedAnswerIsNotUnpacked(t *testing.T) {
	var bomb bytes.Buffer
	zw := gzip.NewWriter(&bomb)
	zeros := make([]byte, 1<<20)
	for range 50 { // 50 MiB in 50 KiB
		zw.Write(zeros)
	}
	zw.Close()
	url, hostport := rawReceiver(t, func(conn net.Conn, r *bufio.Reader) {
		_, _ = readPOST(r)
		_, _ = fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s", bomb.Len(), bomb.Bytes())
	})
	c := startCallbacks(t, Config{Allow: []string{hostport}})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	send(t, c, url)
	await(t, c, "delivery", func(s Stats) bool { return s.Ended[Delivered] == 1 })
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 4<<20 {
		t.Errorf("%d bytes allocated for an answer of %d", n, bomb.Len())
	}
}

// TestCallbackPeerThatRestartsIsFoundAgain: on the same address, once and again.
func TestCallbackPeerThatRestartsIsFoundAgain(t *testing.T) {
	var posts atomic.Int64
	serve := func(addr string) (string, func()) {
		var ln net.Listener
		for start := time.Now(); ; time.Sleep(time.Millisecond) {
			var err error
			if ln, err = net.Listen("tcp", addr); err == nil {
				break
			} else if time.Since(start) > patience {
				t.Fatal(err)
			}
		}
		server := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) { posts.Add(1) })}
		done := make(chan struct{})
		go func() { defer close(done); _ = server.Serve(ln) }()
		return ln.Addr().String(), func() { _ = server.Close(); <-done }
	}
	addr, stop := serve(testproc.FreeAddr(t))
	c := startCallbacks(t, Config{Allow: []string{addr}})
	for round := range uint64(5) {
		for n := range 3 {
			send(t, c, fmt.Sprintf("http://%s/%d/%d", addr, round, n))
		}
		s := await(t, c, "delivery", func(s Stats) bool { return s.Ended[Delivered] == 3*(round+1) })
		if failed(s) != 0 {
			t.Fatalf("round %d: %+v", round, s)
		}
		stop()
		_, stop = serve(addr)
	}
	stop()
	if n := posts.Load(); n != 15 {
		t.Errorf("%d POSTs, want 15: none twice, none lost", n)
	}
}

// TestCallbackFloodForOneVictimIsMergedAndSlow: any number of accepts that name
// one endpoint are a POST each time that the rate allows one.
func TestCallbackFloodForOneVictimIsMergedAndSlow(t *testing.T) {
	const flood, rate = 200_000, 50
	var hits atomic.Int64
	_, victim := receiver(t, func(http.ResponseWriter, *http.Request) { hits.Add(1) })
	c := startPublicCallbacks(t, Config{Rate: rate}, victim, victim)
	ep, err := c.Parse([]byte("http://a.victim.example.com/"))
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	for range flood {
		if !c.Reserve(ep) {
			t.Fatal("no place for the endpoint that waits already")
		}
		c.Send(ep)
	}
	s := await(t, c, "an end", func(s Stats) bool { return s.InFlight+s.Waiting == 0 })
	most := time.Since(began).Seconds()*rate + 2
	if n := hits.Load(); float64(n) > most || uint64(n) != s.Ended[Delivered] || s.Ended[Delivered]+s.Ended[Merged] != flood {
		t.Errorf("the victim was hit %d times, want at most %.0f; %+v", n, most, s)
	}
}

// TestCallbackMemoryIsBoundedForAnyNumberOfDestinations names a hundred thousand
// of them, each of another address.
func TestCallbackMemoryIsBoundedForAnyNumberOfDestinations(t *testing.T) {
	destinations := 100_000
	if raceEnabled {
		destinations /= 10 // each costs ten times as much
	}
	c := startCallbacks(t, Config{workers: 16})
	c.guard.connect = func(context.Context, *net.Dialer, string) (net.Conn, error) { return nil, errNoRoute }
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before, goroutines := heap(), runtime.NumGoroutine()
	path := strings.Repeat("x", 1900) // at their longest
	var most, refused uint64
	for n := range destinations {
		ep, err := c.Parse(fmt.Appendf(nil, "http://93.%d.%d.%d/%s", n>>16, n>>8&255, n&255, path))
		if err != nil {
			t.Fatal(err)
		}
		if c.Reserve(ep) {
			c.Send(ep)
		} else {
			refused++
		}
		if n%10_000 == 0 {
			most = max(most, heap())
		}
	}
	most = max(most, heap())
	if running := runtime.NumGoroutine(); running > goroutines+20 {
		t.Errorf("%d goroutines, %d before", running, goroutines)
	}
	// The table at its fullest, and what is remembered of destinations and addresses.
	limit := uint64(maxWaiting*(maxEndpoint+1024) + maxResting*2048 + maxAddresses*512)
	if most > before+limit {
		t.Errorf("the heap grew by %d MiB, want at most %d", (most-before)>>20, limit>>20)
	}
	s := await(t, c, "an end", func(s Stats) bool { return s.InFlight+s.Waiting == 0 })
	if sends(s)+refused != uint64(destinations) || s.Destinations > maxResting {
		t.Errorf("%d refused, %+v", refused, s)
	}
	if after := heap(); after > before+32<<20 {
		t.Errorf("%d MiB are kept", (after-before)>>20)
	}
}

func TestCallbackInterimAnswerIsNotTheAnswer(t *testing.T) {
	url, hostport := rawReceiver(t, func(conn net.Conn, r *bufio.Reader) {
		_, _ = readPOST(r)
		_, _ = io.WriteString(conn, "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
	})
	c := startCallbacks(t, Config{Allow: []string{hostport}})
	send(t, c, url)
	await(t, c, "the status of the answer", func(s Stats) bool { return s.Ended[FailedStatus] == 1 })
}

// A peer that restarts leaves dead connections in the pool; one retry, on a
// new connection, gets around all of them.
func TestCallbackDeadPooledConnectionIsRetriedOnce(t *testing.T) {
	const pooled = 4
	var mu sync.Mutex
	var conns []net.Conn
	var ids []string
	arrived := make(chan struct{}, 10)
	gate, open := newGate()
	url, hostport := rawReceiver(t, func(conn net.Conn, r *bufio.Reader) {
		mu.Lock()
		conns = append(conns, conn)
		mu.Unlock()
		for {
			req, err := readPOST(r)
			if err != nil {
				return
			}
			mu.Lock()
			ids = append(ids, req.Header.Get("Webhook-Id"))
			mu.Unlock()
			arrived <- struct{}{}
			<-gate
			_, _ = io.WriteString(conn, okAnswer)
		}
	})
	c := startCallbacks(t, Config{Allow: []string{hostport}, Secret: []byte("MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3")})
	t.Cleanup(open)
	for n := range pooled {
		send(t, c, fmt.Sprintf("%s/%d", url, n))
	}
	for range pooled {
		<-arrived
	}
	open()
	await(t, c, "delivery", func(s Stats) bool { return s.Ended[Delivered] == pooled })
	mu.Lock()
	for _, conn := range conns {
		_ = conn.Close()
	}
	mu.Unlock()
	send(t, c, url+"/after")
	s := await(t, c, "delivery", func(s Stats) bool { return s.Ended[Delivered] == pooled+1 })
	mu.Lock()
	defer mu.Unlock()
	if s.Retried != 1 || failed(s) != 0 || len(conns) != pooled+1 || len(ids) != pooled+1 {
		t.Fatalf("%d connections, %d POSTs, %+v", len(conns), len(ids), s)
	}
}

// resetConn is a connection that its peer resets at its end.
type resetConn struct{ net.Conn }

func (c resetConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err == io.EOF {
		err = syscall.ECONNRESET
	}
	return n, err
}

// A POST whose answer began is not sent again, wherever that answer breaks off: its peer
// has had it.
func TestCallbackIsNotRepeatedOnceItsAnswerBegins(t *testing.T) {
	for _, begun := range []string{
		"\r\n",
		"H",
		"HTTP/1.1 100 Continue\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 1",
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
	} {
		for _, reset := range []bool{false, true} {
			t.Run(fmt.Sprintf("%q reset %v", begun, reset), func(t *testing.T) {
				var posts atomic.Int64
				c := startCallbacks(t, Config{Allow: []string{"127.0.0.1:1"}, Connect: func(context.Context, *net.Dialer, string) (net.Conn, error) {
					conn, peer := net.Pipe() // what is written has been read
					go func() {
						defer peer.Close()
						for r, answer := bufio.NewReader(peer), okAnswer; ; answer = begun {
							if _, err := readPOST(r); err != nil {
								return
							}
							posts.Add(1)
							if _, _ = io.WriteString(peer, answer); answer == begun {
								return
							}
						}
					}()
					if reset {
						conn = resetConn{conn}
					}
					return conn, nil
				}})
				send(t, c, "http://127.0.0.1:1/")
				await(t, c, "a kept connection", func(s Stats) bool { return s.Ended[Delivered] == 1 })
				send(t, c, "http://127.0.0.1:1/")
				s := await(t, c, "the end", func(s Stats) bool { return s.Waiting+s.InFlight == 0 })
				if posts.Load() != 2 || s.Ended[FailedAnswer] != 1 || s.Retried != 0 {
					t.Errorf("%d POSTs, %+v", posts.Load(), s)
				}
			})
		}
	}
}

// closeFunc is a connection that calls a function when it is closed.
type closeFunc struct {
	net.Conn
	closed func()
}

func (c closeFunc) Close() error {
	c.closed()
	return c.Conn.Close()
}

// The second try is on a new connection, also if another POST has put back a connection
// meanwhile that is dead as well: the peer ends each after its answer, without a word.
func TestCallbackIsRetriedOnANewConnection(t *testing.T) {
	var c *Sender
	var closes, dials atomic.Int64
	gate, open := newGate()
	three, arrived := newGate()
	c = startCallbacks(t, Config{Allow: []string{"127.0.0.1:1"}, Connect: func(context.Context, *net.Dialer, string) (net.Conn, error) {
		conn, peer := net.Pipe()
		last := dials.Add(1) == 3
		go func() {
			defer peer.Close()
			if _, err := readPOST(bufio.NewReader(peer)); err == nil {
				if last {
					arrived()
					<-gate
				}
				<-three
				_, _ = io.WriteString(peer, okAnswer)
			}
		}()
		return closeFunc{conn, func() {
			if closes.Add(1) == 2 { // the first was the dead one, the second is one as old
				open()
				await(t, c, "the third POST to put its connection back", func(s Stats) bool { return s.Ended[Delivered] == 3 })
			}
		}}, nil
	}})
	t.Cleanup(arrived)
	t.Cleanup(open)
	for n := range 3 {
		send(t, c, fmt.Sprintf("http://127.0.0.1:1/%d", n))
	}
	await(t, c, "two kept connections", func(s Stats) bool { return s.Ended[Delivered] == 2 })
	send(t, c, "http://127.0.0.1:1/after")
	if s := await(t, c, "the end", func(s Stats) bool { return s.Waiting+s.InFlight == 0 }); s.Ended[Delivered] != 4 || s.Retried != 1 {
		t.Errorf("%+v", s)
	}
}

// Bytes after an answer would be taken for the answer to the next POST.
func TestCallbackConnectionWithSurplusBytesIsNotUsedAgain(t *testing.T) {
	var conns atomic.Int64
	url, hostport := rawReceiver(t, func(conn net.Conn, r *bufio.Reader) {
		conns.Add(1)
		for {
			if _, err := readPOST(r); err != nil {
				return
			}
			_, _ = io.WriteString(conn, okAnswer+"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
		}
	})
	c := startCallbacks(t, Config{Allow: []string{hostport}})
	for n := range uint64(3) {
		send(t, c, url)
		await(t, c, "delivery", func(s Stats) bool { return s.Ended[Delivered] == n+1 })
	}
	if n := conns.Load(); n != 3 {
		t.Fatalf("%d connections, want 3", n)
	}
}

func TestCallbackConnectionIsKeptForTheNext(t *testing.T) {
	var conns atomic.Int64
	url, hostport := rawReceiver(t, func(conn net.Conn, r *bufio.Reader) {
		conns.Add(1)
		for {
			if _, err := readPOST(r); err != nil {
				return
			}
			_, _ = io.WriteString(conn, okAnswer)
		}
	})
	c := startCallbacks(t, Config{Allow: []string{hostport}})
	for n := range uint64(5) {
		send(t, c, url)
		await(t, c, "delivery", func(s Stats) bool { return s.Ended[Delivered] == n+1 })
	}
	if n := conns.Load(); n != 1 {
		t.Fatalf("%d connections, want 1", n)
	}
}

func TestCallbackBreakerOpensAndCloses(t *testing.T) {
	const failures, refused = 3, 5
	var healthy atomic.Bool
	var posts atomic.Int64
	url, hostport := receiver(t, func(w http.ResponseWriter, _ *http.Request) {
		posts.Add(1)
		if !healthy.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	})
	opened := func(breakerOpen time.Duration, refused uint64) (*Sender, Stats) {
		t.Helper()
		posts.Store(0)
		c := startCallbacks(t, Config{Allow: []string{hostport}, Concurrency: 1, breakerFailures: failures, breakerOpen: breakerOpen})
		for n := range failures + refused {
			send(t, c, fmt.Sprintf("%s/%d", url, n))
		}
		s := await(t, c, "an open breaker", func(s Stats) bool { return s.InFlight+s.Waiting == 0 })
		if s.Ended[FailedStatus] != failures || s.Ended[FailedBreaker] != refused || posts.Load() != failures {
			t.Fatalf("%d POSTs, %+v", posts.Load(), s)
		}
		return c, s
	}
	if _, s := opened(time.Hour, refused); s.BreakersOpen != 1 {
		t.Errorf("%+v", s)
	}
	c, s := opened(100*time.Millisecond, 0) // may be over when the next is sent
	healthy.Store(true)
	for start := time.Now(); c.Stats().Ended[Delivered] == 0; time.Sleep(time.Millisecond) {
		if time.Since(start) > patience {
			t.Fatalf("breaker does not close: %+v", c.Stats())
		}
		send(t, c, url+"/again")
	}
	if s := await(t, c, "a closed breaker", func(s Stats) bool { return s.InFlight+s.Waiting == 0 }); s.BreakersOpen != 0 {
		t.Fatalf("%+v", s)
	}
	for n := range 10 {
		send(t, c, fmt.Sprintf("%s/%d", url, n))
	}
	before := failed(s)
	s = await(t, c, "delivery", func(s Stats) bool { return s.InFlight+s.Waiting == 0 })
	if s.Ended[FailedStatus] != failures || s.Ended[Delivered] < 11 {
		t.Fatalf("failed %d before, %+v", before, s)
	}
}

func TestCallbackDrainDeliversWhatWaits(t *testing.T) {
	const posts = 10
	gate, open := newGate()
	url, hostport := receiver(t, func(http.ResponseWriter, *http.Request) { <-gate })
	c := startCallbacks(t, Config{Allow: []string{hostport}, Concurrency: 1})
	t.Cleanup(open)
	late, _ := c.Parse([]byte(url + "/late"))
	if !c.Reserve(late) {
		t.Fatal("no place")
	}
	for n := range posts {
		send(t, c, fmt.Sprintf("%s/%d", url, n))
	}
	dropped := make(chan int)
	go func() { dropped <- c.Drain(context.Background()) }()
	other, _ := c.Parse([]byte(url + "/other"))
	for start := time.Now(); c.Reserve(other); time.Sleep(time.Millisecond) {
		c.Release(other)
		if time.Since(start) > patience {
			t.Fatal("takes reservations while draining")
		}
	}
	open()
	await(t, c, "what waited", func(s Stats) bool { return s.Ended[Delivered] == posts })
	c.Send(late) // its request was answered before the drain
	if n := <-dropped; n != 0 {
		t.Fatalf("dropped %d", n)
	}
	if s := c.Stats(); s.Ended[Delivered] != posts+1 || sends(s) != posts+1 {
		t.Fatalf("%+v", s)
	}
}

func TestCallbackDrainCountsWhatIsDropped(t *testing.T) {
	arrived := make(chan struct{}, 10)
	gate, open := newGate()
	url, hostport := receiver(t, func(http.ResponseWriter, *http.Request) { arrived <- struct{}{}; <-gate })
	c := startCallbacks(t, Config{Allow: []string{hostport}, Concurrency: 2, Timeout: time.Hour})
	t.Cleanup(open)
	for n := range 7 {
		send(t, c, fmt.Sprintf("%s/%d", url, n))
	}
	<-arrived
	<-arrived
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if n := c.Drain(ctx); n != 7 {
		t.Errorf("dropped %d, want 7", n)
	}
	if s := c.Stats(); s.Ended[Dropped] != 7 || sends(s) != 7 || s.InFlight != 0 {
		t.Errorf("%+v", s)
	}
	open()
}

func TestCallbackDrainWithoutRunDropsAll(t *testing.T) {
	c := endpointPolicy(t, "")
	send(t, c, "http://hooks.example.com/")
	ep, _ := c.Parse([]byte("http://hooks.example.com/late"))
	c.Reserve(ep)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if n := c.Drain(ctx); n != 1 {
		t.Fatalf("dropped %d, want 1", n)
	}
	c.Send(ep)
	if s := c.Stats(); s.Ended[Dropped] != 2 || s.Reserved != 0 {
		t.Fatalf("%+v", s)
	}
}

func TestCallbackIsSigned(t *testing.T) {
	key := []byte("0123456789abcdef01234567")
	type post struct{ id, timestamp, signature, body string }
	posts := make(chan post, 2)
	url, hostport := receiver(t, func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		posts <- post{r.Header.Get("webhook-id"), r.Header.Get("webhook-timestamp"), r.Header.Get("webhook-signature"), string(body)}
	})
	c := startCallbacks(t, Config{Allow: []string{hostport}, Secret: []byte("whsec_" + base64.StdEncoding.EncodeToString(key))})
	send(t, c, url+"/1")
	send(t, c, url+"/2")
	first, second := <-posts, <-posts
	for _, p := range []post{first, second} {
		if p.id == "" || strings.Contains(p.id, ".") || !verifyWebhook(key, p.id, p.timestamp, p.signature, p.body) {
			t.Errorf("does not verify: %+v", p)
		}
	}
	if first.id == second.id {
		t.Error("two messages have one id")
	}
}

func TestCallbackTLSIsVerified(t *testing.T) {
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // says that the handshake failed, as it should
	server.StartTLS()
	defer server.Close()
	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	hostport := server.Listener.Addr().String()

	t.Run("known root", func(t *testing.T) {
		c := startCallbacks(t, Config{Allow: []string{hostport}, tls: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}})
		for n := range uint64(2) { // the second on the pooled connection
			send(t, c, server.URL)
			await(t, c, "delivery", func(s Stats) bool { return s.Ended[Delivered] == n+1 })
		}
	})
	t.Run("unknown root", func(t *testing.T) {
		c := startCallbacks(t, Config{Allow: []string{hostport}})
		send(t, c, server.URL)
		await(t, c, "refusal", func(s Stats) bool { return s.Ended[FailedConnect] == 1 })
	})
}

func TestCallbackFailuresAreToldApart(t *testing.T) {
	_, resolver := newNameServer(t, func(name string, _ int64) []netip.Addr {
		if name == "inside.example.com" {
			return addrs("10.0.0.1", "127.0.0.1")
		}
		return nil
	})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := ln.Addr().String()
	_ = ln.Close()
	c := startCallbacks(t, Config{Allow: []string{nobody}, Resolver: resolver})
	send(t, c, "http://inside.example.com/")
	send(t, c, "http://nowhere.example.com/")
	send(t, c, "http://"+nobody+"/")
	s := await(t, c, "an end", func(s Stats) bool { return s.InFlight+s.Waiting == 0 })
	if s.Ended[FailedRefused] != 1 || s.Ended[FailedResolve] != 1 || s.Ended[FailedConnect] != 1 || sends(s) != 3 {
		t.Fatalf("%+v", s)
	}
}

func TestCallbackLogTellsNoSecretAndHidesNothing(t *testing.T) {
	const secret, posts = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3", 60
	url, hostport := rawReceiver(t, func(conn net.Conn, r *bufio.Reader) {
		for {
			req, err := readPOST(r)
			if err != nil {
				return
			}
			switch n := req.URL.Path[len(req.URL.Path)-1]; n % 3 {
			case 0:
				_, _ = io.WriteString(conn, okAnswer)
			case 1:
				_, _ = io.WriteString(conn, "HTTP/1.1 404 tok3n\r\nContent-Length: 0\r\n\r\n")
			default:
				_, _ = io.WriteString(conn, "tok3n tok3n\r\n\r\n")
				return
			}
		}
	})
	var logged testproc.Buffer
	c, err := New(Config{
		Allow: []string{hostport}, Secret: []byte(secret), breakerFailures: 1000, Log: zerolog.New(&logged),
		Live: func() (time.Time, uint64) { return time.Unix(0, 0), 1 },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run(ctx) }()
	for n := range posts {
		send(t, c, fmt.Sprintf("%s/path/%d?key=tok3n", url, n))
	}
	await(t, c, "an end", func(s Stats) bool { return s.InFlight+s.Waiting == 0 })
	cancel()
	<-done

	out, told, paths := logged.String(), uint64(0), 0
	for line := range strings.Lines(out) {
		var rec struct {
			URL    string
			Hidden uint64
		}
		if err := json.Unmarshal([]byte(line), &rec); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		told += rec.Hidden
		if rec.URL != "" {
			told++
			if strings.HasPrefix(rec.URL, url+"/path/") {
				paths++
			}
		}
	}
	if strings.Contains(out, "tok3n") || strings.Contains(out, secret) || strings.Contains(fmt.Sprintf("%+v", c.cfg), secret) {
		t.Errorf("log tells a secret:\n%s", out)
	}
	if s := c.Stats(); told != posts || s.Ended[Delivered]+failed(s) != posts || paths == 0 {
		t.Errorf("log tells of %d results (%d with a path), want %d; %+v", told, paths, posts, s)
	}
}

// TestCallbackLogLineIsShort whatever the path is, and the error: the certificate of a
// receiver may have names of any length.
func TestCallbackLogLineIsShort(t *testing.T) {
	var logged testproc.Buffer
	c := startCallbacks(t, Config{
		Allow: []string{"127.0.0.1:1"}, Log: zerolog.New(&logged),
		Connect: func(context.Context, *net.Dialer, string) (net.Conn, error) {
			return nil, x509.HostnameError{Certificate: &x509.Certificate{DNSNames: []string{strings.Repeat("n", 1<<16)}}, Host: "hooks.example.com"}
		},
	})
	send(t, c, "http://127.0.0.1:1/"+strings.Repeat("p", 2000))
	await(t, c, "the line", func(Stats) bool { return logged.String() != "" })
	if line := logged.String(); len(line) > 1024 || !strings.Contains(line, "certificate is valid for nnn") {
		t.Errorf("%d bytes: %.300s", len(line), line)
	}
}

func TestCallbackDestinationsAreForgotten(t *testing.T) {
	c, err := New(Config{Live: func() (time.Time, uint64) { return time.Time{}, 0 }, breakerFailures: 1})
	if err != nil {
		t.Fatal(err)
	}
	c.guard.connect = func(context.Context, *net.Dialer, string) (net.Conn, error) { return nil, errNoRoute }
	run(t, c)
	const destinations = 3 * maxResting
	for n := range destinations {
		ep, err := c.Parse(fmt.Appendf(nil, "http://93.%d.%d.%d/", n>>16, n>>8&255, n&255))
		if err != nil {
			t.Fatal(err)
		}
		for !c.Reserve(ep) {
			time.Sleep(100 * time.Microsecond)
		}
		c.Send(ep)
	}
	s := await(t, c, "an end", func(s Stats) bool { return s.InFlight+s.Waiting == 0 })
	if s.Ended[FailedConnect] != destinations || s.Destinations > maxResting || s.BreakersOpen > maxResting || s.BreakersOpen == 0 {
		t.Fatalf("%+v", s)
	}
	// Repeats reserve and release; that must not push out what is remembered.
	for n := range destinations {
		ep, _ := c.Parse(fmt.Appendf(nil, "http://94.%d.%d.%d/", n>>16, n>>8&255, n&255))
		c.Reserve(ep)
		c.Release(ep)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.dests) != s.Destinations || c.resting.Len() != s.Destinations || len(c.table) != 0 || c.unprovenSlots != 0 {
		t.Fatalf("%d destinations, %d at rest, %d in the table", len(c.dests), c.resting.Len(), len(c.table))
	}
}

func TestCallbackIdleConnectionsAreBoundedAndClosed(t *testing.T) {
	var open atomic.Int64
	_, hostport := rawReceiver(t, func(conn net.Conn, r *bufio.Reader) {
		open.Add(1)
		defer open.Add(-1)
		for {
			if _, err := readPOST(r); err != nil {
				return
			}
			_, _ = io.WriteString(conn, okAnswer)
		}
	})
	_, port, _ := net.SplitHostPort(hostport)
	_, resolver := newNameServer(t, func(string, int64) []netip.Addr { return addrs("127.0.0.1") })
	// Few workers: the name server's socket holds some hundred queries.
	c := startCallbacks(t, Config{Allow: []string{"127.0.0.0/8:" + port}, Resolver: resolver, workers: 16})
	const destinations = maxIdleConns + 100
	for n := range destinations {
		send(t, c, fmt.Sprintf("http://h%d.example.com:%s/", n, port))
	}
	await(t, c, "delivery", func(s Stats) bool { return s.Ended[Delivered] == destinations })
	await(t, c, "closed connections", func(Stats) bool { return open.Load() <= maxIdleConns })
	c.mu.Lock()
	kept := c.idle.Len()
	old := c.takeIdle(time.Now().Add(time.Hour), maxIdleConns)
	c.mu.Unlock()
	closeAll(old)
	if kept != maxIdleConns {
		t.Errorf("%d idle connections are kept, want %d", kept, maxIdleConns)
	}
	await(t, c, "closed connections", func(Stats) bool { return open.Load() == 0 })
}

// Under the race detector this is also the test of the locking.
func TestCallbackEverySendIsAccountedFor(t *testing.T) {
	const senders, each = 8, 400
	var n atomic.Int64
	healthy, healthyAddr := receiver(t, func(http.ResponseWriter, *http.Request) {})
	flaky, flakyAddr := receiver(t, func(w http.ResponseWriter, _ *http.Request) {
		switch n.Add(1) % 4 {
		case 0:
			w.WriteHeader(http.StatusInternalServerError)
		case 1:
			panic(http.ErrAbortHandler)
		}
	})
	self, selfAddr := receiver(t, func(http.ResponseWriter, *http.Request) {})
	c := startCallbacks(t, Config{
		Allow: []string{healthyAddr, flakyAddr}, SelfAddr: netip.MustParseAddrPort(selfAddr), SelfPath: sinkPath, Rate: 500,
		workers: 12, Concurrency: 4, maxWaiting: 64, breakerFailures: 3, breakerOpen: 20 * time.Millisecond,
	})
	var sent atomic.Uint64
	var wg sync.WaitGroup
	for s := range senders {
		wg.Go(func() {
			for i := range each {
				url := []string{healthy + "/x", flaky + "/x", self + "/test"}[(s+i)%3]
				ep, err := c.Parse(fmt.Appendf(nil, "%s?%d", url, i%20))
				if err != nil {
					t.Error(err)
					return
				}
				switch {
				case !c.Reserve(ep):
				case i%5 == 0:
					c.Release(ep)
				default:
					c.Send(ep)
					sent.Add(1)
				}
				if i%50 == 0 {
					time.Sleep(5 * time.Millisecond) // lets breakers turn over
				}
			}
		})
	}
	wg.Wait()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	dropped := c.Drain(ctx)
	s := c.Stats()
	if dropped != 0 || sends(s) != sent.Load() || s.Waiting+s.InFlight+s.Reserved != 0 {
		t.Fatalf("sent %d, dropped %d, accounted for %d: %+v", sent.Load(), dropped, sends(s), s)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.unprovenSlots != 0 || c.unprovenBusy != 0 {
		t.Fatalf("unproven: %d places, %d workers", c.unprovenSlots, c.unprovenBusy)
	}
}

func TestCallbackBadSettingIsNamed(t *testing.T) {
	live := func() (time.Time, uint64) { return time.Time{}, 0 }
	for _, tc := range []struct {
		cfg  Config
		name string
	}{
		{Config{}, "live"},
		{Config{Live: live, Concurrency: -1}, "callback-concurrency"},
		{Config{Live: live, Rate: -1}, "callback-rate"},
		{Config{Live: live, Timeout: -1}, "callback-timeout"},
		{Config{Live: live, Secret: []byte{}}, "callback-secret"},
		{Config{Live: live, Allow: []string{"x"}}, "callback-allow"},
	} {
		if _, err := New(tc.cfg); err == nil || !strings.Contains(err.Error(), tc.name) {
			t.Errorf("error %v, want one that names %q", err, tc.name)
		}
	}
}

// Of equals, each is served once before any is served twice.
func TestCallbackServesDestinationsInTurn(t *testing.T) {
	c := endpointPolicy(t, "", "a.lan:1", "b.lan:1", "c.lan:1")
	for n := range 3 {
		send(t, c, fmt.Sprintf("http://a.lan:1/%d", n))
	}
	for n := range 3 {
		send(t, c, fmt.Sprintf("http://b.lan:1/%d", n))
		send(t, c, fmt.Sprintf("http://c.lan:1/%d", n))
	}
	var order []string
	for range 9 {
		j, _ := c.take()
		order = append(order, j.ep.host+j.ep.target)
	}
	want := strings.Fields("a.lan/0 b.lan/0 c.lan/0 a.lan/1 b.lan/1 c.lan/1 a.lan/2 b.lan/2 c.lan/2")
	if !slices.Equal(order, want) {
		t.Fatalf("order %v, want %v", order, want)
	}
}

func BenchmarkCallbackReserveSend(b *testing.B) {
	for _, endpoints := range []int{1, 1000} {
		b.Run(fmt.Sprintf("endpoints=%d", endpoints), func(b *testing.B) {
			c := endpointPolicy(b, "", "a.lan:1")
			raw := make([][]byte, endpoints)
			for i := range raw {
				raw[i] = fmt.Appendf(nil, "http://a.lan:1/hook?n=%d", i)
			}
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for i := 0; pb.Next(); i++ {
					ep, err := c.Parse(raw[i%endpoints])
					if err != nil {
						b.Error(err)
						return
					}
					if c.Reserve(ep) {
						c.Send(ep)
					}
				}
			})
		})
	}
}

// BenchmarkCallbackBesideATarpit tells what a POST waits, from Send to its
// arrival, for 99 destinations in turn: alone, and with one beside them that
// never answers and is named as often.
func BenchmarkCallbackBesideATarpit(b *testing.B) {
	const destinations = 99
	run := func(b *testing.B, tarpit bool) (p50, p99 time.Duration) {
		arrived := make(chan struct{}, 1)
		_, good := rawReceiver(b, func(conn net.Conn, r *bufio.Reader) {
			for {
				if _, err := readPOST(r); err != nil {
					return
				}
				arrived <- struct{}{}
				_, _ = io.WriteString(conn, okAnswer)
			}
		})
		_, trap := rawReceiver(b, func(_ net.Conn, r *bufio.Reader) { _, _ = io.Copy(io.Discard, r) })
		c, err := New(Config{Rate: 1e6, Live: func() (time.Time, uint64) { return time.Time{}, 0 }})
		if err != nil {
			b.Fatal(err)
		}
		c.guard.connect = func(ctx context.Context, d *net.Dialer, addr string) (net.Conn, error) {
			to := good
			if strings.HasPrefix(addr, victimAddr+":") {
				to = trap
			}
			return new(net.Dialer).DialContext(ctx, "tcp", to)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); _ = c.Run(ctx) }()
		defer func() { cancel(); <-done }()
		post := func(n int) time.Duration {
			if tarpit {
				ep, _ := c.Parse(fmt.Appendf(nil, "http://%s/%d", victimAddr, n))
				if c.Reserve(ep) { // or its share is full, which is as well
					c.Send(ep)
				}
			}
			began := time.Now()
			send(b, c, fmt.Sprintf("http://93.184.217.%d/", n%destinations))
			<-arrived
			return time.Since(began)
		}
		for n := range 2 * destinations { // connections are made
			post(n)
		}
		took := make([]time.Duration, max(b.N, 1000))
		for n := range took {
			took[n] = post(n)
		}
		slices.Sort(took)
		return took[len(took)/2], took[len(took)*99/100]
	}
	alone50, alone99 := run(b, false)
	beside50, beside99 := run(b, true)
	b.ReportMetric(float64(alone99.Microseconds()), "us-p99-alone")
	b.ReportMetric(float64(beside99.Microseconds()), "us-p99-beside")
	b.ReportMetric(float64(beside50)/float64(alone50), "p50-ratio")
	b.ReportMetric(float64(beside99)/float64(alone99), "p99-ratio")
}
