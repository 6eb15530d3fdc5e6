package dedup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"verve/internal/durable"
)

// A journal whose files failed once is never trusted again. What it holds is
// needed until its epochs are published, from memory, by this process; after that a
// new one takes its place, in files of its own. The epoch in which it failed is
// refused to its end: ids that it was given ok for may be missing in the files.

const (
	// syncEvery, and the time that a sync takes, bounds what a loss of power costs: a
	// second.
	syncEvery = 800 * time.Millisecond

	replacedSuffix = ".replaced-" // of a directory that is about to be removed
)

// kept is the journal of the epochs to be opened.
func (m *Memory) kept() *journal {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.journal
}

// Keeps reports whether ids are kept for the next process.
func (m *Memory) Keeps() bool { return m.kept() != nil }

// keep syncs the journal until ctx ends, removes segments that are not needed,
// and replaces a journal that failed.
func (m *Memory) keep(ctx context.Context) {
	tick := time.NewTicker(syncEvery)
	defer tick.Stop()
	for {
		j := m.kept()
		select {
		case <-ctx.Done():
			return
		case <-j.failed:
			j.doubt()
		case <-j.turned:
			_ = j.syncPart(stateName, j.state) // it is kept in broken
		case <-tick.C:
			if j.broken.Load() != nil {
				m.renew(j)
			} else if j.noticeRemoval() == nil && j.sync(true) == nil {
				_ = j.trim() // a file too many; a fault is kept in broken
			}
		}
	}
}

// noticeRemoval fails a journal whose directory was removed, or moved, while it runs: syncs
// of the files that it has open succeed, and no later process finds them. Another directory
// in its place may be that of another process, which is left alone.
func (j *journal) noticeRemoval() error {
	if hasState(j.Dir) {
		return nil
	}
	j.moved = true
	return j.fail(fmt.Errorf("%s was removed while the server runs", j.Dir))
}

// doubt marks the slots of a failed journal: a process that starts before their epochs are
// published makes records for them that are not exact.
func (j *journal) doubt() {
	j.mu.Lock()
	defer j.mu.Unlock()
	defer j.caught(nil, debug.SetPanicOnFault(true)) // the files are broken, as is known
	for i, k := range &j.known {
		if k.serial > 0 && !k.ended && j.state != nil {
			atomic.StoreUint64(&j.slots[i].ended, doubtMark^(k.serial<<8|slotMark))
		}
	}
}

// settled reports whether every epoch of j is published.
func (j *journal) settled() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, k := range &j.known {
		if k.serial > 0 && !k.ended {
			return false
		}
	}
	return true
}

// renew replaces j, which failed, if nothing of it is needed any more and its
// place takes writes again: making the new files, each synced, is the trial.
//
// A kill after the renaming leaves no directory, which is as a first start: all
// that was in it is with the publisher.
func (m *Memory) renew(j *journal) {
	if !j.settled() {
		return
	}
	err := os.Rename(j.Dir, durable.Aside(j.Dir, replacedSuffix))
	if err != nil && !(j.moved && errors.Is(err, fs.ErrNotExist)) {
		return // the next tick tries again
	}
	j.moved = true
	j.release() // its space may be all there is
	next := newJournal(j.Config, j.nudge)
	next.secret, next.first = m.secret, j.first
	if err := next.renewed(j.counts != nil); err != nil {
		next.release()
		return
	}

	m.mu.Lock()
	m.journal = next
	if v := m.current.Load(); v != nil && v.kept == (slotOf{}) && v.refused == nil && m.unretired > 0 {
		// No request could add to the present epoch: it begins now.
		var refused error
		if v.kept, refused = next.begin(m.busy[len(m.busy)-1]); refused == nil {
			v.journal.Store(next) // opens it for requests
		}
	}
	m.mu.Unlock()
	if m.cfg.OnRepair != nil {
		m.cfg.OnRepair()
	}
}

// renewed opens a new directory in the place of one that failed, or that could
// not be made before this process began its first epoch.
func (j *journal) renewed(first bool) error {
	if err := j.open(); err != nil {
		return err
	}
	if j.newest.serial != 0 {
		return fmt.Errorf("%s has epochs of another process", j.Dir)
	}
	if !first {
		j.counts, j.aside, j.powerLost = nil, false, false
	}
	if err := j.extend(); !errors.Is(err, ErrFull) {
		return err
	}
	return nil
}

// removeReplaced removes what journals that were replaced have left.
func (j *journal) removeReplaced() {
	beside, err := os.ReadDir(filepath.Dir(j.Dir))
	if err != nil {
		return // only space is lost, and the next start tries again
	}
	for _, e := range beside {
		if strings.HasPrefix(e.Name(), filepath.Base(j.Dir)+replacedSuffix) {
			_ = os.RemoveAll(filepath.Join(filepath.Dir(j.Dir), e.Name()))
		}
	}
}
