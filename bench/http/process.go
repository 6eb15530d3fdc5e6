package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
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
	done chan error // the outcome, once
}

// start runs a server and waits until it takes connections. dir is its own.
func start(name, verve, dir string, flags []string) (*process, error) {
	p := &process{name: name, done: make(chan error, 1)}
	var err error
	if p.addr, err = freeAddr(); err != nil {
		return nil, err
	}
	if name == "verve" || name == "before" || name == "memory" {
		admin, err := freeAddr()
		if err != nil {
			return nil, err
		}
		args := append([]string{"--listen=" + p.addr, "--admin-listen=" + admin, "--log-level=error"}, flags...)
		if name == "memory" {
			args = append(args, "--data-dir=none", "--counts-file=off")
		} else {
			args = append(args, "--data-dir="+dir)
		}
		p.cmd = pinned(context.Background(), serverCore, verve, args...)
		p.cmd.Stderr = os.Stderr // the others log their counts there
	} else {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		p.cmd = pinned(context.Background(), serverCore, self, "serve", name, p.addr)
		if name == "plain" {
			p.cmd.Args = append(p.cmd.Args, flags...)
		}
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	go func() { p.done <- p.cmd.Wait() }()
	if err := p.awaitConnections(); err != nil {
		return nil, err
	}
	return p, nil
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
			p.kill()
			return fmt.Errorf("%s does not take connections", p.name)
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

// end stops the server and waits for it.
func (p *process) end() error {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("%s: %w", p.name, err)
	}
	select {
	case err := <-p.done:
		if exit, ok := errors.AsType[*exec.ExitError](err); ok && !exit.Exited() {
			return nil // by the signal: only Verve has a stop of its own
		}
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		return nil
	case <-time.After(stopLimit):
		p.kill()
		return fmt.Errorf("%s did not stop", p.name)
	}
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill() // has ended already if it fails
	<-p.done
}

// freeAddr returns an address that nobody listens on.
func freeAddr() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer ln.Close()
	return ln.Addr().String(), nil
}
