package system_test

import (
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"verve/internal/testproc"
)

// tokenWindow is long enough for a restart on a busy machine, and short enough to wait for
// two turns.
const tokenWindow = 4 * time.Second

// retrier asks for one id, again and again.
type retrier struct {
	t       *testing.T
	id      string
	v       *testproc.Server
	counted map[time.Time]int // how often, in each window, by the answers; of several ids
}

// reply is an answer, and the window in which the request was.
type reply struct {
	status   int
	replayed bool
	window   time.Time // that the answer names
	within   time.Time // that the request was sent and answered in; zero: the turn was between
}

func (c *retrier) ask(token string) (r reply) {
	c.t.Helper()
	sent := time.Now().Truncate(tokenWindow)
	url := c.v.Public + "/api/verve/accept?id=" + c.id
	if token != "" {
		url += "&token=" + token
	}
	resp, err := http.Get(url)
	if err != nil {
		c.t.Fatal(err)
	}
	resp.Body.Close()
	if r.window, err = time.Parse(time.RFC3339, resp.Header.Get("Verve-Window")); err != nil {
		c.t.Fatalf("status %d: %v", resp.StatusCode, err)
	}
	if sent.Equal(time.Now().Truncate(tokenWindow)) {
		r.within = sent
	}
	r.status, r.replayed = resp.StatusCode, resp.Header.Get("Verve-Replayed") == "true"
	if r.status == 200 && !r.replayed {
		c.counted[r.window]++
	}
	return r
}

// send sends an attempt whose reply nobody reads.
func (c *retrier) send(token string) {
	c.t.Helper()
	nc, err := net.Dial("tcp", strings.TrimPrefix(c.v.Public, "http://"))
	if err != nil {
		c.t.Fatal(err)
	}
	defer nc.Close()
	fmt.Fprintf(nc, "GET /api/verve/accept?id=%s&token=%s HTTP/1.1\r\nHost: v\r\n\r\n", c.id, token)
	time.Sleep(50 * time.Millisecond) // the kill finds it before or after it was judged: both must do
}

// await returns at the start of a window.
func await(window time.Time) { time.Sleep(time.Until(window.Add(10 * time.Millisecond))) }

// TestRetryGetsItsOwnAnswer: attempts with a token, the process ended in each way before
// and after the reply was read, and started again: the retry is ok, in the window that
// counted it and in the next one; in the one after that the id is new.
func TestRetryGetsItsOwnAnswer(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds of real time")
	}
	t.Parallel()
	for _, restart := range []string{"none", "kill", "stop", "kill, another instance", "stop, another instance"} {
		t.Run(restart, func(t *testing.T) {
			t.Parallel() // they wait more than they work
			dir := t.TempDir()
			flags := []string{"--window=" + tokenWindow.String(), "--window-header", "--data-dir=" + dir}
			v := testproc.Start(t, flags...)
			counted := map[time.Time]int{}
			read, unread := &retrier{t, "order-4711", v, counted}, &retrier{t, "order-4712", v, counted}
			await(time.Now().Truncate(tokenWindow).Add(tokenWindow))
			first := read.ask("a")
			if first.status != 200 || first.replayed {
				t.Fatalf("the attempt: got %+v, want ok", first)
			}
			unread.send("a")
			if strings.HasSuffix(restart, "another instance") {
				flags = append(flags, "--instance=another")
			}
			switch {
			case strings.HasPrefix(restart, "kill"):
				v.Kill()
			case strings.HasPrefix(restart, "stop"):
				if code := v.Stop(); code != 0 {
					t.Fatalf("exit code %d\n%s", code, v.Text())
				}
			}
			if restart != "none" {
				v = testproc.Start(t, flags...)
				read.v, unread.v = v, v
			}

			// The attempt that nobody read the reply of has counted or not. Now it has.
			r := unread.ask("a")
			r.inTime(t, first.window)
			if r.status != 200 {
				t.Errorf("the first retry: got %+v, want ok", r)
			} else if r.replayed {
				counted[r.window]++
			}
			for next := range 2 {
				await(first.window.Add(time.Duration(next) * tokenWindow))
				read.wantReplay(first.window, first.window)
				unread.wantReplay(r.window, first.window)
			}
			await(first.window.Add(3 * tokenWindow))
			for _, c := range []*retrier{read, unread} {
				if r := c.ask("a"); r.status != 200 || r.replayed {
					t.Errorf("id %s three windows later: got %+v, want it counted anew", c.id, r)
				}
			}
			if code := v.Stop(); code != 0 {
				t.Errorf("exit code %d\n%s", code, v.Text())
			}
			// Twice each at least; more often where a window turned between two requests.
			for _, r := range testproc.Records(t, filepath.Join(dir, "counts.jsonl")) {
				counted[r.Start] -= r.Unique
			}
			for window, n := range counted {
				if n != 0 {
					t.Errorf("the window of %v has %d ok answers more than its records count", window, n)
				}
			}
		})
	}
}

// inTime ends the test if r is not an answer of the first window or the next one.
func (r *reply) inTime(t *testing.T, first time.Time) {
	t.Helper()
	if r.within.IsZero() || r.within.After(first.Add(tokenWindow)) {
		t.Skipf("this machine is too slow: asked in the window of %v, for what began in that of %v", r.within, first)
	}
}

// wantReplay asks again for what was counted in a window.
func (c *retrier) wantReplay(counted, first time.Time) {
	c.t.Helper()
	r := c.ask("a")
	r.inTime(c.t, first)
	if r.status != 200 || !r.replayed || !r.window.Equal(counted) {
		c.t.Errorf("a retry for id %s in the window of %v: got %+v, want ok, replayed, counted in that of %v", c.id, r.within, r, counted)
	}
	if !r.within.Equal(counted) {
		return
	}
	for _, token := range []string{"", "b"} {
		if r := c.ask(token); r.within.Equal(counted) && (r.status != 409 || r.replayed) {
			c.t.Errorf("id %s with token %q: got %+v, want a repeat", c.id, token, r)
		}
	}
}
