package main

import (
	"context"
	"math/rand/v2"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// answers takes what a command prints for answers of a server.
type answers struct{ truth *truth }

func (a answers) Write(b []byte) (int, error) {
	a.truth.record(0, time.Now(), []answer{{kind: answerRefused}})
	return len(b), nil
}

func TestServerExitsAreJudged(t *testing.T) {
	if _, err := exec.LookPath("sh"); err != nil {
		t.Skipf("the commands of this test need a shell: %v", err)
	}
	for _, test := range []struct {
		name, command string
		signal        string
		kills, killed int
		stopLimit     time.Duration
		want          string // a part of the only fault
	}{
		{"killed as often as asked", "sh -c 'echo answer; exec sleep 600'", "KILL", 3, 3, time.Minute, "after SIGTERM with signal: terminated"}, // sleep has no handler
		{"ends by itself", "sh -c 'exit 3'", "TERM", 3, 0, time.Minute, "by itself: exit status 3"},
		{"ends by itself with 0", "true", "TERM", 3, 0, time.Minute, "by itself: exit status 0"},
		{"deaf to SIGTERM", `sh -c 'trap "" TERM; while :; do echo answer; sleep 0.01; done'`, "TERM", 1, 1, 200 * time.Millisecond, "did not end within"},
	} {
		t.Run(test.name, func(t *testing.T) {
			truth := newTruth(1, time.Minute, false)
			s := &spawner{
				flags:   &flags{Signal: test.signal, Kills: test.kills, StopLimit: test.stopLimit},
				command: test.command, min: 50 * time.Millisecond, max: 100 * time.Millisecond,
				output: answers{truth}, rng: rand.New(rand.NewPCG(1, 2)), truth: truth,
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			s.run(ctx)
			s.end()
			select {
			case <-s.server.exited:
			default:
				t.Error("the server is still running")
			}
			if s.killed != test.killed {
				t.Errorf("got %d kills, want %d", s.killed, test.killed)
			}
			if f := s.truth.faults; f.Count != 1 || !strings.Contains(f.Lines[0], test.want) {
				t.Errorf("got faults %+v, want one with %q", f, test.want)
			}
		})
	}
}

func TestParseEvery(t *testing.T) {
	for in, want := range map[string][2]time.Duration{
		"500ms-3s": {500 * time.Millisecond, 3 * time.Second},
		"1s":       {time.Second, time.Second},
	} {
		low, high, err := parseEvery(in)
		if err != nil || low != want[0] || high != want[1] {
			t.Errorf("%q: got %s, %s, %v; want %v", in, low, high, err, want)
		}
	}
	for _, bad := range []string{"", "3", "3s-1s", "0s-1s", "-1s", "1s-2s-3s"} {
		if _, _, err := parseEvery(bad); err == nil {
			t.Errorf("%q: got no error", bad)
		}
	}
}
