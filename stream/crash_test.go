package stream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kfake"

	"verve/internal/testproc"
)

// childEnv makes the test binary a server's worth of stream that kills itself.
const childEnv = "VERVE_STREAM_CHILD"

// childSpec is what a child does: it goes on where the spool ends, publishes up
// to window Until and delivers, unless it kills itself at the Nth time it comes
// to Step.
type childSpec struct {
	Dir, Counts string
	Brokers     []string
	Topic       string
	Scope       Scope
	Until       int
	Keys        int  // of each record
	OneByOne    bool // deliver each before the next is published
	Step        string
	Nth         int64
	DiskFull    bool // see fillDisk
}

func child(spec string) {
	var c childSpec
	err := json.Unmarshal([]byte(spec), &c)
	if err == nil {
		err = c.run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// fillDisk appends until the disk refuses, frees it and goes on.
func (c childSpec) fillDisk() error {
	sp, err := OpenSpool(SpoolConfig{Dir: c.Dir, Group: "verve", Instance: "host-1"})
	if err != nil {
		return err
	}
	if err := sp.attach([]string{"a"}); err != nil {
		return err
	}
	testproc.SurviveFileSize()
	if err := testproc.LimitFileSize(96 << 10); err != nil {
		return err
	}
	refused := 0
	for i := 0; i < c.Until; {
		r := record(i)
		err := sp.append(&r, withKeys(window(i), c.Keys).Keys, noStep)
		switch {
		case err == nil:
			i++
		case refused < 3: // a few tries into the full disk
			refused++
		case refused == 3:
			refused++
			if err := testproc.LimitFileSize(1 << 30); err != nil {
				return err
			}
		default:
			return fmt.Errorf("record %d still refused: %w", i, err)
		}
	}
	if refused == 0 {
		return errors.New("the disk was never full")
	}
	return sp.Close()
}

func (c childSpec) run() error {
	if c.DiskFull {
		return c.fillDisk()
	}
	sp, err := OpenSpool(SpoolConfig{Dir: c.Dir, Group: "verve", Instance: "host-1"})
	if err != nil {
		return err
	}
	cfg := Config{Scope: c.Scope, CountsFile: c.Counts}
	if len(c.Brokers) > 0 {
		cfg.Kafka = KafkaConfig{Brokers: c.Brokers, Topic: c.Topic, KeysTopic: c.Topic + ".keys"}
	}
	s, err := New(cfg, sp)
	if err != nil {
		return err
	}
	var came atomic.Int64
	stepHook := func(step string) {
		if step == c.Step && came.Add(1) == c.Nth {
			self, _ := os.FindProcess(os.Getpid()) // it is there
			_ = self.Kill()
			select {}
		}
	}
	s.testStep.Store(&stepHook)
	ctx, cancel := context.WithTimeout(context.Background(), brokerPatience)
	defer cancel()
	done := make(chan struct{})
	go func() { defer close(done); s.Run(ctx) }()
	// What the counter knows of its own, after a kill, is what is not in the
	// spool.
	next := 0
	if at, _ := lastWindow(sp); !at.IsZero() {
		next = int(at.Sub(origin)/time.Minute) + 1
	}
	for ; next < c.Until; next++ {
		if err := s.Publish(ctx, withKeys(window(next), c.Keys)); err != nil {
			return err
		}
		if c.OneByOne {
			if err := s.Flush(ctx); err != nil {
				return err
			}
		}
	}
	if err := s.Flush(ctx); err != nil {
		return err
	}
	cancel()
	<-done
	s.Close()
	return sp.Close()
}

// start runs the child and returns whether it killed itself.
func (c childSpec) start(t *testing.T) (killed bool) {
	t.Helper()
	spec, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+string(spec))
	out, err := cmd.CombinedOutput()
	if err == nil {
		return false
	}
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("child %s: %v: %s", spec, err, out)
	}
	return true
}

// killAtEveryStep is the promise: whatever step a process is killed at, nothing
// is lost and nothing is visible twice.
func killAtEveryStep(t *testing.T, brokers []string, keys, rounds int) {
	const perRound = 3
	steps := []string{stepBefore, stepAppended, stepSynced, stepProduced, stepCommitted, stepAcked}
	if keys > 0 {
		steps = append(steps, stepKeys)
	}
	for _, step := range steps {
		t.Run(step, func(t *testing.T) {
			dir := t.TempDir()
			c := childSpec{
				Dir: dir, Brokers: brokers, Scope: ScopeInstance, Step: step, Keys: keys,
				Topic: fmt.Sprintf("kill.%d.%s", keys, step), Counts: filepath.Join(dir, "counts.jsonl"),
			}
			for round := range rounds {
				c.Until = (round + 1) * perRound
				// In turns: killed at the first, second, third record of its own,
				// and with all three under way at once.
				c.OneByOne = round%4 != 3
				c.Nth = int64(1 + round%4%3)
				if !c.start(t) {
					t.Fatalf("round %d: the child did not come to its step", round)
				}
			}
			c.Step = ""
			if c.start(t) {
				t.Fatal("the last child was killed")
			}
			wantWindows(t, readCounts(t, c.Counts), c.Until)
			wantKeys(t, readKeys(t, ReadKeysFile(t.Context(), c.Counts, false)), c.Until, keys)
			if len(brokers) > 0 {
				cfg := KafkaConfig{Brokers: brokers, Topic: c.Topic, KeysTopic: c.Topic + ".keys"}
				wantWindows(t, readTopic(t, cfg), c.Until)
				wantKeys(t, readKeys(t, ReadKeysTopic(t.Context(), cfg, false)), c.Until, keys)
			}
		})
	}
}

func TestKillAtEveryStepLosesAndDoublesNothing(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	t.Parallel()
	c, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.AllowAutoTopicCreation(), kfake.DefaultNumPartitions(3))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	killAtEveryStep(t, c.ListenAddrs(), 0, 4)
	t.Run("keys", func(t *testing.T) { killAtEveryStep(t, c.ListenAddrs(), 5, 4) })
}

// filled runs a process whose disk is full for a while, and opens its spool.
func (c childSpec) filled(t *testing.T) *Spool {
	t.Helper()
	if c.start(t) {
		t.Fatal("killed")
	}
	sp := testSpool(t, c.Dir)
	t.Cleanup(func() { sp.Close() })
	if err := sp.attach([]string{"a"}); err != nil {
		t.Fatal(err)
	}
	return sp
}

func TestSpoolGoesOnAfterAFullDisk(t *testing.T) {
	c := childSpec{Dir: t.TempDir(), DiskFull: true, Until: 600}
	sp := c.filled(t)
	wantWindows(t, drain(t, sp, "a"), c.Until)
}

func TestDamagedSpoolIsNamedInTheLog(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, spoolFile), []byte(strings.Repeat("x", 1<<16)), 0o644); err != nil {
		t.Fatal(err)
	}
	s := start(t, dir, Config{})
	if st := s.Stats(); !strings.Contains(st.SetAside, "spool.db.damaged-") {
		t.Errorf("set aside as %q", st.SetAside)
	}
}
