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

// A journal whose files failed once is never trusted again. It is needed until this process has
// published its epochs, from memory; after that a new journal, in files of its own, takes its
// place. Until then all ids are refused. The epoch in which it failed is refused to its end:
// ids that were answered ok in it may be missing in the files.

const (
	// syncEvery is the pause between two syncs. Together with the time that a sync takes it
	// bounds what a loss of power costs: the ids of about a second.
	syncEvery = 800 * time.Millisecond

	replacedSuffix = ".replaced-" // in the name of a directory that will be removed
)

// kept returns the journal for the epochs that will be opened; nil: nothing is kept.
func (m *Memory) kept() *journal {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.journal
}

// Keeps reports whether this Memory has a journal, in which ids are kept for the next process.
func (m *Memory) Keeps() bool { return m.kept() != nil }

// keep works until ctx ends: it syncs the journal, removes segments that are not needed, and
// replaces a journal that failed.
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
			_ = j.syncPart(stateName, j.state) // broken keeps the error
		case <-tick.C:
			if j.broken.Load() != nil {
				m.renew(j)
			} else if j.noticeRemoval() == nil && j.sync(true) == nil {
				_ = j.trim() // an error leaves a file too many; broken keeps a fault
			}
		}
	}
}

// noticeRemoval makes the journal fail if its directory was removed, or moved, while the
// process runs: syncs of the mapped files still succeed, but no later process would find them.
// Another directory in its place may belong to another process, and is left alone.
func (j *journal) noticeRemoval() error {
	if hasState(j.Dir) {
		return nil
	}
	j.moved = true
	return j.fail(fmt.Errorf("%s was removed while the server runs", j.Dir))
}

// doubt marks the slots of a failed journal whose epochs are not published: a process that
// starts before they are makes records for them that are not exact.
func (j *journal) doubt() {
	j.mu.Lock()
	defer j.mu.Unlock()
	defer j.caught(nil, debug.SetPanicOnFault(true)) // another fault changes nothing: the journal has failed already
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

// renew replaces j, which failed, if all its epochs are published and the disk accepts writes
// again. Making the new files, each of which is synced, tests that.
//
// If the process is killed after the renaming, there is no directory, and the next start is
// like a first one: everything in the old directory was published.
func (m *Memory) renew(j *journal) {
	if !j.settled() {
		return
	}
	err := os.Rename(j.Dir, durable.Aside(j.Dir, replacedSuffix))
	if err != nil && !(j.moved && errors.Is(err, fs.ErrNotExist)) {
		return // the next tick tries again
	}
	j.moved = true
	j.release() // the disk may have no other space
	next := newJournal(j.Config, j.nudge)
	next.secret, next.first = m.secret, j.first
	if err := next.renewed(j.counts != nil); err != nil {
		next.release()
		return
	}

	m.mu.Lock()
	m.journal = next
	if v := m.current.Load(); v != nil && v.kept == (slotOf{}) && v.refused == nil && m.unretired > 0 {
		// The failed journal had no slot for the open epoch, so no id was added to it. The new
		// journal begins it now.
		var refused error
		if v.kept, _, refused = next.begin(m.busy[len(m.busy)-1]); refused == nil {
			v.journal.Store(next) // opens it for requests
		}
	}
	m.mu.Unlock()
	if m.cfg.OnRepair != nil {
		m.cfg.OnRepair()
	}
}

// renewed makes and opens a new directory in the place of one that failed or could not be made.
// first: this process has not begun an epoch yet.
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

// removeReplaced removes the directories of journals that were replaced.
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
