//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	turnKeys   = 100_000
	turnConns  = 4
	turnPace   = 100 * time.Microsecond // between two requests: p99.9 of a phase is the second-longest time
	turnLength = 2 * time.Second        // of a window
	turnSpan   = 200 * time.Millisecond // before and after a turn

	// Keys are sent, 1,000 every keyPace, from keysFrom on in a window: that is over before the
	// requests are timed.
	keysFrom = 400 * time.Millisecond
	keyPace  = 10 * time.Millisecond
)

// turns sends 10,000 new ids a second, each in a request, to a server with short windows, and
// compares the answers before and after the turns: of windows without keys, and of windows
// with 100,000 of them, which are published at the turn. It prints the median over the turns,
// as what else a machine does hits some of them, and those of all turns together.
func (r *run) turns(ctx context.Context, out io.Writer) (samples []sample, err error) {
	p, err := r.start("verve", "turn", append(slices.Clone(r.Flags), "--window="+turnLength.String()))
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(out, "turn: answers in the %v before and after the end of a window, ms\n", turnSpan)
	names := []string{"plain", "keys"}
	var seen [2][2][][]float64 // of each turn
	for round := range r.Rounds {
		for i := range names {
			found, err := driveTurns(ctx, p.addr, names[i] == "keys", max(1, r.Seconds*int(time.Second)/int(turnLength)))
			if err != nil {
				return samples, err
			}
			for phase, name := range []string{"before", "after"} {
				seen[i][phase] = append(seen[i][phase], found[phase]...)
				samples = append(samples, sample{Scenario: "turn", Server: names[i] + "-" + name, Round: round + 1, P999: median(quantiles(found[phase], .999))})
			}
		}
	}
	for i, name := range names {
		before, after := seen[i][0], seen[i][1]
		for _, q := range []float64{.5, .99, .999} {
			b, a := median(quantiles(before, q)), median(quantiles(after, q))
			bb, aa := quantile(slices.Concat(before...), q), quantile(slices.Concat(after...), q)
			fmt.Fprintf(out, "%5s  p%-4v  a turn: before %.3f  after %.3f  after/before %.2f   all turns: %.3f  %.3f  %.2f\n", name, 100*q, b, a, a/b, bb, aa, aa/bb)
		}
	}
	fmt.Fprintln(out)
	return samples, nil
}

func quantiles(turns [][]float64, q float64) (of []float64) {
	for _, v := range turns {
		of = append(of, quantile(v, q))
	}
	return of
}

func quantile(v []float64, q float64) float64 {
	slices.Sort(v)
	return v[int(q*float64(len(v)))]
}

// sent is a request on its way. phase is 0 before a turn, 1 after it, -1 elsewhere.
type sent struct {
	at    time.Time
	turn  int // the nearest one
	phase int
	took  float64 // ms, once it is answered
}

// driveTurns returns how long the answers before and after each of some turns took. No request
// waits for the answer to another.
func driveTurns(ctx context.Context, addr string, keys bool, turns int) (seen [2][][]float64, err error) {
	seen = [2][][]float64{make([][]float64, turns), make([][]float64, turns)} // before the turns, after them
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var conns [turnConns]net.Conn
	var ways [turnConns]chan sent
	var answers, batches sync.WaitGroup
	var timed [turnConns][]sent
	for i := range conns {
		if conns[i], err = net.Dial("tcp", addr); err != nil {
			return seen, err
		}
		defer conns[i].Close()
		ways[i] = make(chan sent, 1<<14)
		answers.Go(func() {
			var err error
			if timed[i], err = readAnswers(conns[i], ways[i]); err != nil {
				cancel(err)
			}
		})
	}
	first := time.Now().Truncate(turnLength).Add(4 * turnLength) // the first turn that counts: tables have grown to their sizes
	last := first.Add(time.Duration(turns-1) * turnLength)
	if keys {
		batches.Go(func() {
			for at := first.Add(keysFrom - 3*turnLength); at.Before(last); at = at.Add(turnLength) {
				time.Sleep(time.Until(at))
				if err := sendKeys(addr); err != nil {
					cancel(err)
				}
			}
		})
	}
	request := []byte("GET /api/verve/accept?id=1000000000000 HTTP/1.1\r\nHost: verve\r\n\r\n")
	id := request[len("GET /api/verve/accept?id="):][:len("1000000000000")]
	number := time.Now().UnixMicro() % 1e9 * 1000 // other ids in each drive
	due := time.Now()
	for i := 0; ctx.Err() == nil; i++ {
		due = due.Add(turnPace)
		sleepUntil(due)
		now := time.Now()
		if now.After(last.Add(turnSpan)) {
			break
		}
		s := sent{now, int((now.Sub(first) + turnLength/2) / turnLength), phaseOf(now.Sub(first.Add(-turnLength))), 0}
		number++
		strconv.AppendInt(id[:0], 1e12+number, 10)
		ways[i%turnConns] <- s
		if _, err := conns[i%turnConns].Write(request); err != nil {
			cancel(err)
		}
	}
	for i := range ways {
		close(ways[i])
	}
	answers.Wait()
	batches.Wait()
	for _, s := range slices.Concat(timed[:]...) {
		seen[s.phase][s.turn] = append(seen[s.phase][s.turn], s.took)
	}
	return seen, context.Cause(ctx)
}

// phaseOf is the phase of a request that is sent so long after the turn before the first.
func phaseOf(offset time.Duration) int {
	switch {
	case offset < turnLength/2:
		return -1
	case offset%turnLength < turnSpan:
		return 1
	case offset%turnLength > turnLength-turnSpan:
		return 0
	}
	return -1
}

// sleepUntil is right to some microseconds. A sleep of the runtime is to a millisecond.
func sleepUntil(due time.Time) {
	for pause := time.Until(due); pause > 0; pause = time.Until(due) {
		wait := unix.NsecToTimespec(int64(pause))
		_ = unix.Nanosleep(&wait, nil)
	}
}

// readAnswers times the answers to the requests of a connection.
func readAnswers(conn io.Reader, way <-chan sent) (timed []sent, err error) {
	r := bufio.NewReader(conn)
	for s := range way {
		for blank := false; !blank; {
			line, err := r.ReadSlice('\n')
			if err != nil {
				return timed, err
			}
			blank = len(line) == len("\r\n")
		}
		body, err := r.Peek(len("ok"))
		if err != nil || !bytes.Equal(body, []byte("ok")) {
			return timed, fmt.Errorf("an id that is new: %q, %w", body, err)
		}
		_, _ = r.Discard(len(body)) // it is there
		if s.phase >= 0 {
			s.took = float64(time.Since(s.at)) / float64(time.Millisecond)
			timed = append(timed, s)
		}
	}
	return timed, nil
}

// sendKeys sends an id under each key.
func sendKeys(addr string) error {
	defer runtime.GC() // not while requests are timed
	for from := 0; from < turnKeys; from += 1000 {
		began := time.Now()
		var body bytes.Buffer
		for i := from; i < from+1000; i++ {
			fmt.Fprintf(&body, `,{"id":"%d","key":"campaign-%d"}`, i, i)
		}
		body.Bytes()[0] = '['
		body.WriteByte(']')
		resp, err := http.Post("http://"+addr+"/api/verve/accept", "application/json", &body)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, resp.Body)
		if err = errors.Join(err, resp.Body.Close()); err != nil || resp.StatusCode != http.StatusOK {
			return fmt.Errorf("keys: %s, %w", resp.Status, err)
		}
		time.Sleep(time.Until(began.Add(keyPace)))
	}
	return nil
}
