package counter

import (
	"context"
	"slices"
	"sync"
	"time"
)

const (
	// maxTick bounds the ticker's sleep. So a clock set forward is noticed within this time on
	// an idle server; a request notices it at once.
	maxTick = 100 * time.Millisecond

	// The closer polls until the last request has left an epoch. It sleeps drainMin first,
	// about as long as a request stays in an epoch, and backs off to drainMax.
	drainMin = 20 * time.Microsecond
	drainMax = 5 * time.Millisecond
)

// Run turns the epochs that no request turns. It closes and publishes, in order, the epochs
// that have ended. It returns nil after Seal, when the last count is published; the context's
// error if ctx ends first; and the error of a Publisher that gives up. The count of that epoch
// stays with the Counter, and another Run publishes it. Only one Run may be active at a time.
func (c *Counter) Run(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	var ticker sync.WaitGroup
	ticker.Go(func() { c.tick(ctx) })
	defer ticker.Wait()
	defer stop()
	for {
		e, sealed := c.oldest()
		if e == nil && sealed {
			return nil
		}
		if e == nil {
			select {
			case <-c.wake:
			case <-ctx.Done():
				return ctx.Err()
			}
			continue
		}
		err := c.close(ctx, e)
		if err == nil { // OnClose reports e before the skipped epochs after it
			err = c.publishSkipped(ctx, e)
		}
		if err != nil {
			return err
		}
	}
}

// tick turns each epoch at its end and keeps the spare ready. It has a goroutine of its own
// because closing an epoch may wait for a disk.
func (c *Counter) tick(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		now := c.cfg.clocks()
		e := c.open.Load()
		if e == nil {
			return
		}
		if now.wall >= e.end {
			c.turn(now.wall)
			e = c.Last()
		}
		c.provide()
		sleep := min(time.Duration(e.end-now.wall), maxTick)
		c.watch(now, sleep)
		timer.Reset(sleep)
	}
}

// oldest returns the first epoch to close. If there is none it returns nil, and whether Seal
// was called, so that none will come.
func (c *Counter) oldest() (*Epoch, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.turned) == 0 {
		return nil, c.open.Load() == nil
	}
	return c.turned[0], false
}

// close waits until no request is in e, reads its count, publishes it and retires e. It is
// the only reader of a sealed epoch.
func (c *Counter) close(ctx context.Context, e *Epoch) (err error) {
	began := time.Now()
	count := Count{
		Start:    e.Start(),
		Window:   e.Window(),
		Complete: e.complete,
		Exact:    e.Exact(),
	}
	if c.cfg.OnClose != nil {
		defer func() { c.cfg.OnClose(count, time.Since(began), err) }()
	}

	if err = drain(ctx, e); err != nil {
		return err
	}
	// e is now sealed: it is not open and no request is in it, so its sums are final.
	count.Unique, count.Repeats, count.Exact = e.Unique(), e.Repeats(), e.Exact()
	count.Keys, count.SealedAt = e.owed, c.wall()
	if !e.recovered {
		count.Keys = e.keys.Counts()
	}
	if err = c.cfg.Publisher.Publish(ctx, count); err != nil {
		return err
	}
	e.retire()
	e.keys.release(e == c.Last())

	c.mu.Lock()
	c.turned = slices.Delete(c.turned, 0, 1) // keeps the capacity, so that a turn allocates nothing
	if !e.recovered {
		c.closed.unique += count.Unique
		c.closed.repeats += count.Repeats
		c.closed.keys = count.Keys.Len()
	}
	c.mu.Unlock()
	return nil
}

// wall returns the present time, UTC.
func (c *Counter) wall() time.Time { return time.Unix(0, c.cfg.clocks().wall).UTC() }

func drain(ctx context.Context, e *Epoch) error {
	for wait := drainMin; !e.Idle(); wait = min(2*wait, drainMax) {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		time.Sleep(wait)
	}
	return nil
}

// publishSkipped publishes the epochs between e and the next opened one. No request could enter
// them, so they are empty and not complete. Only the last maxSkipped epochs of a gap are
// published; Stats.Skipped counts all of them. A stop whose time is over leaves out the others:
// thousands of syncs would delay the record of the last epoch, which has ids.
func (c *Counter) publishSkipped(ctx context.Context, e *Epoch) error {
	if e.gap == 0 {
		return nil
	}
	skipped := c.epochsBetween(e.end, e.gap)
	c.skipped.Add(uint64(skipped))
	at := e.end
	if skipped > maxSkipped {
		at = max(at, e.gap-maxSkipped*int64(c.cfg.Window))
	}
	for at < e.gap && ctx.Err() == nil {
		start, window := c.epochAt(at)
		count := Count{
			Start:    time.Unix(0, start).UTC(),
			Window:   time.Duration(window),
			Exact:    true,
			SealedAt: c.wall(),
		}
		err := c.cfg.Publisher.Publish(ctx, count)
		if c.cfg.OnClose != nil {
			c.cfg.OnClose(count, 0, err)
		}
		if err != nil {
			return err
		}
		at = c.endOf(start, window)
	}
	return nil
}
