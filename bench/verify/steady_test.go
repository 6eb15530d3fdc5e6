package main

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestGrowthIsAFault: of a server that takes ever more of one thing, and of one
// that does not.
func TestGrowthIsAFault(t *testing.T) {
	for _, l := range levels {
		for _, grows := range []bool{false, true} {
			dir, n := t.TempDir(), 0
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				for _, o := range levels {
					value := 2 * o.slack
					if grows && o.name == l.name {
						value += float64(n) * o.slack / 8
					}
					fmt.Fprintf(w, "%s %g\n", o.metric, value)
				}
				n++
			}))
			s := steady{admin: server.URL, dir: dir, samples: map[string][]float64{}}
			for i := range 40 {
				size := 100
				if grows && l.name == "disk" {
					size += i << 20
				}
				if err := os.Truncate(touched(t, dir, "spool.db"), int64(size)); err != nil {
					t.Fatal(err)
				}
				if err := os.Truncate(touched(t, dir, "counts.jsonl"), int64(i)<<20); err != nil {
					t.Fatal(err)
				}
				if err := s.sample(); err != nil {
					t.Fatal(err)
				}
			}
			server.Close()
			v := verdict{Good: true}
			s.judge(&v)
			var out strings.Builder
			v.print(&out)
			if v.Good == grows || grows && !strings.Contains(out.String(), "grows: "+l.name) {
				t.Errorf("%s grows: %t; the verdict:\n%s", l.name, grows, &out)
			}
		}
	}
}

func touched(t *testing.T, dir, name string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	return path
}

// TestNothingSampledIsAFault: a run without samples says nothing about growth.
func TestNothingSampledIsAFault(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	asked := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if asked++; asked == 2 { // the first answer has been read
			cancel()
		}
		w.WriteHeader(http.StatusNotFound)
	}))
	defer server.Close()
	s := steady{admin: server.URL}
	s.run(ctx, time.Second)
	v := verdict{Good: true}
	if s.judge(&v); v.Good || s.failed == nil {
		t.Errorf("good: %t, %v", v.Good, s.failed)
	}
}
