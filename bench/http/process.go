//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	serverCore = "0"
	wrkCore    = "1"

	startLimit = 10 * time.Second
	stopLimit  = 15 * time.Second
)

// process is a server that was started.
type process struct {
	name string
	addr string
	cmd  *exec.Cmd
	stop context.CancelFunc // sends SIGTERM, and SIGKILL after stopLimit
	done chan error         // the outcome, once
}

// start runs a server until endAll. Its data is in a folder of its own.
func (r *run) start(name, folder string, flags []string) (*process, error) {
	addr, err := freeAddr()
	admin, failed := freeAddr()
	self, unknown := os.Executable()
	if err = errors.Join(err, failed, unknown); err != nil {
		return nil, err
	}
	verve := append([]string{"--listen=" + addr, "--admin-listen=" + admin, "--log-level=error"}, flags...)
	data := "--data-dir=" + filepath.Join(r.dir, folder)
	switch name {
	case "verve":
		return r.launch(name, addr, os.Stderr, r.Binary, append(verve, data)...)
	case "before":
		return r.launch(name, addr, os.Stderr, r.Before, append(verve, data)...)
	case "memory":
		return r.launch(name, addr, os.Stderr, r.Binary, append(verve, "--data-dir=none", "--counts-file=off")...)
	case "plain":
		return r.launch(name, addr, nil, self, append([]string{"serve", name, addr}, flags...)...)
	}
	return r.launch(name, addr, nil, self, "serve", name, addr)
}

// startRedis runs a Redis on the servers' core until endAll.
func (r *run) startRedis() (*process, error) {
	if _, err := exec.LookPath("redis-server"); err != nil {
		return nil, errors.New("redis-server is not installed")
	}
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	host, port, _ := strings.Cut(addr, ":")
	return r.launch("redis", addr, nil, "redis-server", "--bind", host, "--port", port, "--save", "", "--dir", r.dir, "--logfile", "redis.log")
}

// launch starts a server, and returns when it takes connections. stderr may be nil: a seed
// logs its counts.
func (r *run) launch(name, addr string, stderr io.Writer, program string, args ...string) (*process, error) {
	ctx, stop := context.WithCancel(context.Background())
	p := &process{name: name, addr: addr, cmd: pinned(ctx, serverCore, program, args...), stop: stop, done: make(chan error, 1)}
	p.cmd.Stderr = stderr
	p.cmd.Cancel = func() error { return p.cmd.Process.Signal(syscall.SIGTERM) }
	p.cmd.WaitDelay = stopLimit
	if err := p.cmd.Start(); err != nil {
		stop()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	go func() { p.done <- p.cmd.Wait() }()
	if err := p.awaitConnections(); err != nil {
		return nil, err
	}
	r.servers = append(r.servers, p)
	return p, nil
}

// endAll stops the servers, the last one first.
func (r *run) endAll() (err error) {
	for _, p := range slices.Backward(r.servers) {
		err = errors.Join(err, p.end())
	}
	r.servers = nil
	return err
}

// awaitConnections returns when the process takes connections. If it does not, it is
// ended.
func (p *process) awaitConnections() error {
	for deadline := time.Now().Add(startLimit); ; time.Sleep(10 * time.Millisecond) {
		select {
		case err := <-p.done:
			return fmt.Errorf("%s ended: %v", p.name, err)
		default:
		}
		if c, err := net.Dial("tcp", p.addr); err == nil {
			c.Close()
			return nil
		}
		if time.Now().After(deadline) {
			return errors.Join(fmt.Errorf("%s does not take connections", p.name), p.end())
		}
	}
}

// pinned returns a command bound to a core, where that can be done and there
// is another one left. taskset replaces itself by the command, so the process
// is the server's own.
func pinned(ctx context.Context, core, name string, args ...string) *exec.Cmd {
	if _, err := exec.LookPath("taskset"); err != nil || runtime.NumCPU() < 2 {
		return exec.CommandContext(ctx, name, args...)
	}
	return exec.CommandContext(ctx, "taskset", append([]string{"-c", core, name}, args...)...)
}

// cpuTime is the CPU time of the process so far, user and system, by the clock that
// clock_getcpuclockid(3) has for it.
func (p *process) cpuTime() (time.Duration, error) {
	const all = 2 // CPUCLOCK_SCHED of the kernel, of a whole process
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^p.cmd.Process.Pid)<<3|all, &t); err != nil {
		return 0, fmt.Errorf("CPU time of %s: %w", p.name, err)
	}
	return time.Duration(t.Nano()), nil
}

// cpuTimes sums that up over servers, and over their Redis.
func cpuTimes(servers, redis []*process) (sums [2]time.Duration, err error) {
	for i, of := range [][]*process{servers, redis} {
		for _, p := range of {
			t, failed := p.cpuTime()
			sums[i], err = sums[i]+t, errors.Join(err, failed)
		}
	}
	return sums, err
}

// end stops the server and waits for it.
func (p *process) end() error {
	p.stop()
	err := <-p.done
	exit, failed := errors.AsType[*exec.ExitError](err)
	switch {
	case failed && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL:
		return fmt.Errorf("%s did not stop", p.name)
	case failed && exit.Exited():
		return fmt.Errorf("%s: %w", p.name, err)
	}
	return nil // in order, or by the signal: only Verve has a stop of its own
}

// freeAddr returns an address that no process listens on.
func freeAddr() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer ln.Close()
	return ln.Addr().String(), nil
}
