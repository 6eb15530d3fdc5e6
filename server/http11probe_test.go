package server

import (
	"io"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestEveryProbeOfHttp11Probe sends what the conformance suite of that name
// (github.com/MDA2AV/Http11Probe, November 2026) sends, on our routes. A row of
// http11probe_cases.tsv is the suite's name of a probe, its bytes, where {a*3} stands for
// aaa, our answers, and the suite's verdict on them: pass, warn (legal, but not what it
// prefers), or chosen, where the contract wants another answer than the suite. SECURITY.md
// lists those.
func TestEveryProbeOfHttp11Probe(t *testing.T) {
	t.Parallel()
	file, err := os.ReadFile("testdata/http11probe_cases.tsv")
	if err != nil {
		t.Fatal(err)
	}
	repeated := regexp.MustCompile(`(?s)\{(.+?)\*(\d+)\}`)
	verdicts := map[string]int{}
	for line := range strings.Lines(string(file)) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if len(f) != 4 {
			t.Fatalf("row %q", line)
		}
		raw, err := strconv.Unquote(f[1])
		if err != nil {
			t.Fatalf("%s: %v", f[0], err)
		}
		raw = repeated.ReplaceAllStringFunc(raw, func(s string) string {
			m := repeated.FindStringSubmatch(s)
			n, _ := strconv.Atoi(m[2]) // the expression has digits
			return strings.Repeat(m[1], n)
		})
		verdicts[f[3]]++
		t.Run(f[0], func(t *testing.T) {
			t.Parallel()
			s := newSite(t, func(cfg *Config) { cfg.SlowTimeout = slowTimeoutFor(f[2]) })
			if got := s.probe(raw, strings.Contains(f[2], "408")); got != f[2] {
				t.Errorf("got %q, want %q", got, f[2])
			}
		})
	}
	if n := verdicts["pass"] + verdicts["warn"] + verdicts["chosen"]; n != 215 || len(verdicts) != 3 {
		t.Errorf("got %v, want the 215 probes of the suite", verdicts)
	}
}

var statusLine = regexp.MustCompile(`HTTP/1\.1 (\d{3}) `)

// probe sends raw and, unless it is incomplete, one more request. It returns the statuses
// of the answers to raw, and "close" if the connection was closed behind them.
func (s *site) probe(raw string, incomplete bool) string {
	s.t.Helper()
	c, r := s.dial()
	if !incomplete {
		raw += "GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
	}
	go func() {
		_, _ = io.WriteString(c, raw) // may be refused before its end
		if !incomplete {
			_ = c.(*net.TCPConn).CloseWrite()
		}
	}()
	all, err := io.ReadAll(r)
	if err != nil {
		s.t.Errorf("after %q: %v", all, err)
	}
	var got []string
	for _, m := range statusLine.FindAllSubmatch(all, -1) {
		got = append(got, string(m[1]))
	}
	if n := len(got) - 1; n >= 0 && got[n] == "404" && !incomplete {
		return strings.Join(got[:n], " ")
	}
	return strings.Join(append(got, "close"), " ")
}
