package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// spawner runs the server under test itself, ends it at random moments, and
// starts it again at once.
type spawner struct {
	*flags
	command  string        // for the shell, which gives its place to it
	addr     string        // where it alone answers; empty: unknown
	target   int           // of the run, with addr
	min, max time.Duration // life of a server; max 0: it is left alone
	output   io.Writer
	rng      *rand.Rand
	truth    *truth

	killed int      // how often so far
	server *process // the running one, or the last
}

// newSpawners returns one for each --spawn.
func newSpawners(d *driver, output io.Writer) (all []*spawner, err error) {
	var low, high time.Duration
	if d.KillEvery != "" {
		if low, high, err = parseEvery(d.KillEvery); err != nil {
			return nil, err
		}
	}
	for i, command := range d.Spawn {
		s := &spawner{
			flags: &d.flags, command: command, min: low, max: high, output: output,
			rng: rand.New(rand.NewPCG(d.Seed, uint64(i))), truth: d.truth,
		}
		if len(d.targets) == len(d.Spawn) {
			s.addr, s.target = d.targets[i].addr, i
		}
		all = append(all, s)
	}
	return all, nil
}

// each calls f for all spawners at once, and returns when all calls have.
func each(spawners []*spawner, f func(*spawner)) {
	var all sync.WaitGroup
	for _, s := range spawners {
		all.Go(func() { f(s) })
	}
	all.Wait()
}

func spawnLog(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
}

// parseEvery reads MIN-MAX, or one duration for both.
func parseEvery(s string) (low, high time.Duration, err error) {
	from, to, both := strings.Cut(s, "-")
	if !both {
		to = from
	}
	if low, err = time.ParseDuration(from); err == nil {
		high, err = time.ParseDuration(to)
	}
	if err != nil || low <= 0 || high < low {
		return 0, 0, fmt.Errorf("--kill-every: %q is not MIN-MAX, such as 500ms-3s", s)
	}
	return low, high, nil
}

// run starts the server and ends it again and again, until ctx ends, or until the kills are
// used up, the run has got its least answers and one more life is over. The server is then
// still running; end stops it. An unexpected exit, and one after SIGTERM that is late or not
// 0, is a fault of the run and ends it.
func (s *spawner) run(ctx context.Context) {
	for {
		server, err := startProcess(s.command, s.output)
		if err != nil {
			s.truth.fault("server exit", "%v", err)
			return
		}
		s.server = server
		last := s.Kills > 0 && s.killed == s.Kills
		// With SIGTERM a life counts from the first answer, since a process
		// that has not set its handlers yet dies of the signal. SIGKILL may
		// fall into the start as well: that is the point of it. On a busy machine
		// it would always fall there, so every second life counts from its answers.
		if s.Signal != "KILL" || s.killed%2 == 1 || last {
			s.awaitAnswer(ctx)
		}
		if last {
			s.await(ctx, func() bool { return s.truth.progress() >= s.MinAnswers })
		}
		if !s.live(ctx) || ctx.Err() != nil || last {
			return
		}
		s.killed++
		if s.Signal == "KILL" {
			s.server.kill()
		} else if !s.end() {
			return
		}
	}
}

// process is a server that was started.
type process struct {
	cmd    *exec.Cmd
	exited chan struct{}
	err    error // after exited
}

// startProcess runs a command by the shell, which gives its place to it.
func startProcess(command string, output io.Writer) (*process, error) {
	cmd := exec.Command("sh", "-c", "exec "+command)
	cmd.Stdout, cmd.Stderr = output, output
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the server: %w", err)
	}
	p := &process{cmd: cmd, exited: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.exited)
	}()
	return p, nil
}

func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.exited
}

// stop ends the process with SIGTERM and returns what is wrong with how it ended, if
// anything is.
func (p *process) stop(limit time.Duration) error {
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
		if p.err != nil {
			return fmt.Errorf("the server ended after SIGTERM with %w", p.err)
		}
		return nil
	case <-time.After(limit):
		p.kill()
		return fmt.Errorf("the server did not end within %s of SIGTERM and was killed", limit)
	}
}

// awaitAnswer waits until some connection has got an answer from this process, as far as
// it is known which are its answers.
func (s *spawner) awaitAnswer(ctx context.Context) {
	if s.addr != "" {
		// The last answers of the process before are all read by then.
		s.await(ctx, func() bool { return listens(s.addr, time.Second) })
	}
	before := s.answers()
	s.await(ctx, func() bool { return s.answers() != before })
}

func (s *spawner) answers() uint64 {
	if s.addr == "" {
		return s.truth.progress()
	}
	return s.truth.answersOf(s.target)
}

// await waits until done, until ctx ends or until the process has ended.
func (s *spawner) await(ctx context.Context, done func() bool) {
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for !done() {
		select {
		case <-ctx.Done():
			return
		case <-s.server.exited:
			return // live reports it
		case <-poll.C:
		}
	}
}

// live lets the server live for a drawn time, or until ctx ends. It returns false
// if the server ended by itself.
func (s *spawner) live(ctx context.Context) bool {
	var up <-chan time.Time
	if s.max > 0 {
		up = time.After(s.min + time.Duration(s.rng.Int64N(int64(s.max-s.min)+1)))
	}
	select {
	case <-ctx.Done():
	case <-up:
	case <-s.server.exited:
		s.truth.fault("server exit", "the server ended by itself: %s", s.server.cmd.ProcessState)
		return false
	}
	return true
}

// end stops the server with SIGTERM and reports whether it ended in time with 0.
// Without a running server it does nothing.
func (s *spawner) end() bool {
	if s.server == nil {
		return true
	}
	select {
	case <-s.server.exited:
		return true
	default:
	}
	if err := s.server.stop(s.StopLimit); err != nil {
		s.truth.fault("server exit", "%v", err)
		return false
	}
	return true
}
