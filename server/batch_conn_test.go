package server

import (
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

const chunkedBatch = "POST " + acceptPath + " HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"

// TestConnectionBehindABatch: whatever a batch was answered, what follows it on its
// connection is a request of its own, or the connection is closed. The statuses are
// those of the requests and, if it is still open, of a last one.
func TestConnectionBehindABatch(t *testing.T) {
	t.Parallel()
	single := get("id=single")
	oneInChunks := strings.Replace(chunkedBatch, acceptPath, acceptPath+"?id=9", 1)
	toWaitFor := func(contentType string) string {
		return strings.Replace(oneInChunks, "Host: x\r\n", "Host: x\r\nExpect: 100-continue\r\nContent-Type: "+contentType+"\r\n", 1)
	}
	small := batchPost("", "", "", "1\n2")
	large := batchPost("", "", "", strings.Repeat("12345678901234567890\n", 4000))
	long := func(line string) string {
		return strings.Replace(batchPost("", "", "", strings.Repeat("1\n", 40_000)), acceptPath, line, 1)
	}
	for _, c := range []struct{ name, raw, want string }{
		{"batches and single requests", small + single + large + small + single, "200 200 200 200 409"},
		{"chunks", chunkedBatch + "3\r\n1\n2\r\n2\r\n\n3\r\n0\r\n\r\n" + single, "200 200"},
		{"chunks with extensions and a trailer", chunkedBatch + "1;a=b;c=\"d\"\r\n1\r\n0\r\nX: y\r\n\r\n" + single, "200 200"},
		{"chunks that hold a request", chunkedBatch + fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(single), single), "200"},
		{"no chunks", chunkedBatch + "0\r\n\r\n" + single, "400 close"},
		{"a chunk without a size", chunkedBatch + "\r\n1\r\n0\r\n\r\n" + single, "400 close"},
		{"a chunk of a bad size", chunkedBatch + "1g\r\n1\r\n0\r\n\r\n" + single, "400 close"},
		{"a chunk that is longer than it says", chunkedBatch + "1\r\n12\r\n0\r\n\r\n" + single, "400 close"},
		{"a chunk that ends in LF", chunkedBatch + "1\r\n1\n0\r\n\r\n" + single, "400 close"},
		{"an extension with LF", chunkedBatch + "1;\n\r\n1\r\n0\r\n\r\n" + single, "400 close"},
		{"a size that overflows", chunkedBatch + "ffffffffffffffff1\r\n1\r\n0\r\n\r\n" + single, "400 close"},
		{"a bad batch", batchPost("", "application/json", "", "[1") + single, "400 close"},
		{"an unknown type", batchPost("", "application/xml", "", "<a/>") + single, "415 close"},
		{"too many bytes announced", batchPost("", "", "", strings.Repeat("1\n", 1<<20)) + single, "413 close"},
		{"too many bytes in chunks", chunkedBatch + strings.Repeat("10000\r\n"+strings.Repeat("1\n", 1<<15)+"\r\n", 20) + "0\r\n\r\n", "413 close"},
		{"too many ids", batchPost("", "", "", strings.Repeat("1\n", 10_001)) + single, "413 close"},
		{"an id in the query and a body", batchPost("?id=1", "", "", "1\n2") + single, "400 close"},
		{"a bad endpoint", batchPost("?endpoint=x", "", "", "1\n2") + single, "400 200"},
		{"a body where none is taken", long("/other") + single, "404 200"},
		{"a body of another method", strings.Replace(long(acceptPath), "POST", "PUT", 1) + single, "405 200"},
		{"a body of GET", strings.Replace(small, "POST", "GET", 1) + single, "400 close"},
		{"a request to wait for", strings.Replace(small, "Host: x\r\n", "Host: x\r\nExpect: 100-continue\r\n", 1) + single, "100 200 200"},
		{"one to wait for that is too large", strings.Replace(batchPost("", "", "", strings.Repeat("1\n", 1<<20)), "Host: x\r\n", "Host: x\r\nExpect: 100-continue\r\n", 1), "413 close"},
		{"one to wait for of an unknown type", strings.Replace(batchPost("", "a/b", "", "1\n"), "Host: x\r\n", "Host: x\r\nExpect: 100-continue\r\n", 1), "415 close"},
		{"one for the sink to wait for", "POST " + SinkPath + " HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 65536\r\n\r\n" + strings.Repeat("x", maxBody) + single, "100 200 200"},
		{"one for the sink that is too large", "POST " + SinkPath + " HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 65537\r\n\r\n", "413 close"},
		{"HTTP/1.0", strings.Replace(small, "HTTP/1.1", "HTTP/1.0", 1), "200 close"},
		{"the last one", strings.Replace(small, "Host: x\r\n", "Host: x\r\nConnection: close\r\n", 1) + single, "200 close"},
		{"single POST requests", "POST " + acceptPath + "?id=9 HTTP/1.1\r\nHost: x\r\n\r\n" + "POST " + acceptPath + "?id=9 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", "200 409"},
		{"a single POST request in no chunks", oneInChunks + "0\r\n\r\n" + single, "200 200"},
		{"the same twice", strings.Repeat(oneInChunks+"0\r\n\r\n", 2), "200 409 close"},
		{"one to wait for, of whatever type", toWaitFor("a/b") + "0\r\n\r\n" + single, "100 200 200"},
		{"one to wait for, of whatever type, in chunks", toWaitFor("a/b") + "1\r\n1\r\n0\r\n\r\n", "100 400 close"},
		{"a batch in chunks to wait for, of an unknown type", strings.Replace(toWaitFor("a/b"), "?id=9", "", 1), "415 close"},
		{"a bad id in the query, to wait for", strings.Replace(toWaitFor("a/b"), "?id=9", "?id=", 1), "400 close"},
		{"an id in the query and chunks", oneInChunks + "1\r\n1\r\n0\r\n\r\n" + single, "400 close"},
		{"an id in the query and bad chunks", oneInChunks + "1\r\n\r\n" + single, "400 close"},
		{"no id and no body", "POST " + acceptPath + " HTTP/1.1\r\nHost: x\r\n\r\n" + single, "400 200"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			for _, pieces := range []int{0, 1, 3} {
				s := newSite(t, nil)
				want, closed := strings.CutSuffix(c.want, " close")
				if !closed {
					want += " 200" // of the last one
				}
				if got := s.statuses(c.raw+get("id=last"), pieces); got != want {
					t.Errorf("in %d pieces: got %q, want %q", pieces, got, want)
				}
			}
		})
	}
}

// statuses sends raw, in some pieces, says that this was all, and returns the statuses
// of the answers until the connection is closed.
func (s *site) statuses(raw string, pieces int) string {
	c, r := s.dial()
	go func() {
		for range pieces {
			n := len(raw) / 2
			if _, err := io.WriteString(c, raw[:n]); err != nil {
				return // refused before its end
			}
			raw = raw[n:]
			time.Sleep(time.Millisecond) // for a segment of its own; not waited for
		}
		_, _ = io.WriteString(c, raw) // may be refused before its end
		_ = c.(*net.TCPConn).CloseWrite()
	}()
	var got []string
	for {
		resp, _, err := answer(r)
		if err != nil {
			return strings.Join(got, " ")
		}
		got = append(got, fmt.Sprint(resp.StatusCode))
	}
}

// TestSlowBatchIsAnswered408, wherever in its body it stops.
func TestSlowBatchIsAnswered408(t *testing.T) {
	t.Parallel()
	s := newSite(t, func(c *Config) { c.SlowTimeout = 300 * time.Millisecond })
	head := fmt.Sprintf("POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", acceptPath, 100_000)
	var slow sync.WaitGroup
	for name, raw := range map[string]string{
		"before the body": head, "in its first bytes": head + "1\n2", "behind them": head + strings.Repeat("1\n", 10_000),
		"before a chunk": chunkedBatch, "in the size of a chunk": chunkedBatch + "1", "in a chunk": chunkedBatch + "ff\r\n1\n2", "behind a chunk": chunkedBatch + "1\r\n1",
		"in a trailer": chunkedBatch + "1\r\n1\r\n0\r\nX: y",
	} {
		c, r := s.dial()
		slow.Go(func() {
			if _, err := io.WriteString(c, raw); err != nil {
				t.Error(err)
				return
			}
			if resp, body, err := answer(r); err != nil || resp.StatusCode != 408 || body != "failed" || !resp.Close {
				t.Errorf("%s: got %v %q %v", name, resp, body, err)
			}
		})
	}
	slow.Wait()
	if n := s.cfg.Counter.Stats().Unique; n != 0 {
		t.Errorf("%d ids were counted", n)
	}
}

// TestClientThatReadsLateSeesItsRefusal: one that sends all of a batch before it reads
// is not reset, though the server does not take it.
func TestClientThatReadsLateSeesItsRefusal(t *testing.T) {
	t.Parallel()
	s := newSite(t, nil)
	for range 5 {
		c, r := s.dial()
		if _, err := io.WriteString(c, batchPost("", "", "", strings.Repeat("1\n", 3<<19))); err != nil { // 3 MiB
			t.Fatal(err)
		}
		if resp, body, err := answer(r); err != nil || resp.StatusCode != 413 || body != "failed" {
			t.Fatalf("got %v %q %v", resp, body, err)
		}
	}
}

// TestStopWhileABatchArrives: it is answered 503 and counts nothing; one that has come
// is answered with verdicts, and is in the record.
func TestStopWhileABatchArrives(t *testing.T) {
	s := newSite(t, nil)
	if resp, _ := s.ask(batchPost("", "", "", "1\n2")); resp.StatusCode != 200 {
		t.Fatal(resp)
	}
	raw := batchPost("", "", "", strings.Repeat("12345678901234567\n", 1000))
	c, r := s.dial()
	if _, err := io.WriteString(c, raw[:len(raw)-5]); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the batch is being read", func() bool { return s.batches.used.Load() > 0 })
	done := s.shutdown(patience)
	if _, err := io.WriteString(c, raw[len(raw)-5:]); err != nil {
		t.Fatal(err)
	}
	if resp, body, err := answer(r); err != nil || resp.StatusCode != 503 || body != "failed" || resp.Header.Get("Verve-Reason") != "draining" || !resp.Close {
		t.Errorf("got %v %q %v", resp, body, err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := s.cfg.Counter.Stats().Unique; n != 2 {
		t.Errorf("%d ids were counted, want 2", n)
	}
}

// TestSlowBatchesHarmNobody: a thousand clients that send batches slowly hold what they
// have sent, and others are answered beside them.
func TestSlowBatchesHarmNobody(t *testing.T) {
	t.Parallel()
	const clients = 1000
	s := newSite(t, nil)
	head := fmt.Sprintf("POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", acceptPath, 1<<20)
	for range clients {
		c, _ := s.dial()
		if _, err := io.WriteString(c, head+strings.Repeat("1\n", 5000)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all are read", func() bool { return s.batches.used.Load() == clients*batchStep })
	for i := range 20 {
		raw := batchPost("", "", "", strings.Repeat(fmt.Sprintf("%d\n", i), 10_000))
		if resp, body := s.ask(raw); resp.StatusCode != 200 || !strings.HasPrefix(body, "ok\nduplicate\n") {
			t.Fatalf("a batch beside them: %d %.20q", resp.StatusCode, body)
		}
	}
	eventually(t, "only they hold memory", func() bool { return s.batches.used.Load() == clients*batchStep })
}
