package dedup

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"os"
	"runtime/debug"
	"slices"
	"time"
	"unsafe"

	"verve/counter"
)

// publisherOf makes a number of the name of a publisher, which is never 0.
func publisherOf(name string) uint64 {
	sum := sha256.Sum256([]byte(name))
	return binary.LittleEndian.Uint64(sum[:]) | 1
}

// past returns what earlier processes left to be published; published is what each
// publisher has published.
//
// The ids that are missing in the records of an epoch: those that the journal has beyond logged,
// less those that its publisher has published beyond published. The slot has logged and
// published of one moment, so it does not matter whether the last process was killed before or
// after its last record was published. This publisher takes over what another one did not
// publish.
//
// An epoch that may have lost ids gets a record even if none is missing: its other records are
// exact. odd is not empty if the directory does not fit what this publisher has published, so
// that ids may be missing; it is the reason.
func (j *journal) past(published map[string]counter.Published) (past counter.Past, odd string) {
	defer j.caught(nil, debug.SetPanicOnFault(true)) // an error is kept in broken
	by := map[uint64]counter.Published{}
	for other, p := range published {
		by[publisherOf(other)] = p
		if other != j.Publisher {
			j.first.others = append(j.first.others, p)
		}
	}
	byKey := keysOf(published)
	own := by[j.publisher]
	j.first.pastRead = true
	j.first.start, j.first.sum = own.Last, own.Unique
	behind := j.behind(own)
	if j.made && !j.aside && !own.Last.IsZero() {
		odd = "is missing, and there are records of the windows before"
	} else if behind {
		odd = "is older than the last record, as an earlier copy of it is"
	}
	j.aside = j.aside || odd != ""
	j.recreate()
	j.guess(own.Last, behind)
	past.Serial = j.newest.serial
	for _, o := range j.unsettled() {
		its := by[o.publisher]
		if o.publisher == j.publisher {
			its = counter.Published{Last: j.first.start, Unique: j.first.sum}
		}
		r := j.remainder(&o, its)
		r.count(j.keyed[o.serial], byKey[o.number*int64(o.window)])
		if r.lost {
			past.Lost = append(past.Lost, counter.Recovered{Start: o.start(), Window: o.window, Unique: r.unpublished, Exact: !r.doubtful})
		}
		if o.publisher != j.publisher && !r.settled {
			j.adopt(&o, r.have-r.missing, j.sumOf(&o), r.doubtful)
		}
		newest := o.serial == j.newest.serial
		if newest {
			past.Start, past.Window, past.Over = o.start(), o.window, !j.resumable
			j.first.logged, j.first.published = r.have-r.missing, j.sumOf(&o)
		}
		switch {
		case o.ended:
		case r.settled && newest && j.resumable:
			j.first.settled = true
		case r.settled:
			j.end(o.of())
		default:
			past.Recovered = append(past.Recovered, counter.Recovered{
				Serial: o.serial, Start: o.start(), Window: o.window, Unique: r.missing, Keys: r.keys, NoKeys: r.keysLost,
				Exact: !r.doubtful, State: recoveredEpoch{j, o.of()},
			})
			j.first.sum = j.sumOf(&o) + r.missing
			j.first.start = o.start()
		}
	}
	return past, odd
}

// recoveredEpoch is the State of an epoch that an earlier process counted.
type recoveredEpoch struct {
	in *journal
	of slotOf
}

// Retire implements counter.State.
func (l recoveredEpoch) Retire() { l.in.end(l.of) }

// remainder is what an epoch still needs.
type remainder struct {
	have     uint64            // ids in the journal
	missing  uint64            // ids that no record has
	doubtful bool              // ids may be lost
	settled  bool              // no record is to be published for it
	keys     counter.KeyCounts // the part of missing that is under keys
	keysLost bool              // it is not known

	// Set if ids that no record has cannot get one any more.
	lost        bool
	unpublished uint64
}

// remainder compares an epoch with what its publisher has published.
func (j *journal) remainder(o *opened, its counter.Published) (r remainder) {
	var sum uint64 // of the records for its window
	recorded := o.start().Equal(its.Last)
	if recorded {
		sum = its.Unique
	}
	l := j.counts[o.serial]
	r.have = l.sum()
	// Less than was published: to a spool that was lost.
	r.missing = less(less(r.have, o.logged), less(sum, o.published))
	// The labels of this publisher increase: it cannot publish for one that it is past.
	over := o.start().Before(its.Last) || o.start().Before(j.first.start)
	r.doubtful = o.inexact || j.lost(o)
	if !o.ended && over && !o.start().Before(its.Last) && (r.missing > 0 || r.doubtful) {
		r.lost, r.unpublished = true, r.missing
	}
	if o.ended || over {
		r.missing = 0
	}
	r.settled = o.ended || over || recorded && r.missing == 0 && !r.doubtful
	return r
}

// count finds what is missing by key. It is not known if the spool has lost what was published
// by key, or if that does not fit what is missing in all.
func (r *remainder) count(k *keyed, published publishedKeys) {
	if r.missing == 0 || k == nil {
		return
	}
	keys, sum, ok := k.counts(published.ids)
	if r.keys = keys; !ok || published.lost || sum > r.missing {
		r.keys, r.keysLost, r.doubtful = counter.KeyCounts{}, true, true
	}
}

// publishedKeys is what was published by key for a window.
type publishedKeys struct {
	ids  map[string]uint64
	lost bool // it is more than that
}

// keysOf is that of each window, by its start in Unix ns, over all publishers.
func keysOf(published map[string]counter.Published) map[int64]publishedKeys {
	all := map[int64]publishedKeys{}
	for _, p := range published {
		of := all[p.Last.UnixNano()]
		if of.ids == nil {
			of.ids = map[string]uint64{}
		}
		for key, unique := range p.Keys.All() {
			of.ids[string(key)] += unique
		}
		of.lost = of.lost || p.KeysLost
		all[p.Last.UnixNano()] = of
	}
	return all
}

// sumOf is what this publisher has, or will have, published for the window of o.
func (j *journal) sumOf(o *opened) uint64 {
	if o.start().Equal(j.first.start) {
		return j.first.sum
	}
	return 0
}

// unsettled returns the epochs that are not ended, and the newest, the oldest
// first.
func (j *journal) unsettled() (all []opened) {
	for i := range j.slots {
		if j.known[i].serial > 0 && (!j.known[i].ended || j.known[i].serial == j.newest.serial) {
			if o, ok := j.slots[i].read(); ok {
				o.slot = i
				all = append(all, o)
			}
		}
	}
	slices.SortFunc(all, func(a, b opened) int { return int(int64(a.serial - b.serial)) })
	return all
}

// adopt makes o an epoch of this publisher, which is about to publish what is missing. The new
// slot is on the disk before that: otherwise, after a kill, another publisher would publish the
// same ids once more.
func (j *journal) adopt(o *opened, logged, published uint64, doubtful bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	i, free := j.freeSlot()
	if free == 0 {
		return // 1,024 epochs wait
	}
	before := *o
	o.logged, o.published, o.publisher = logged, published, j.publisher
	o.generation, o.inexact, o.boot, o.slot = o.generation+1, doubtful, j.boot, i
	j.write(o)
	if j.syncPart(stateName, j.state) != nil {
		return // it is kept in broken
	}
	if j.newest.serial == o.serial {
		j.newest = *o
	}
	j.free(before.slot)
}

// recreate makes slots for the windows that may have begun, and had ids answered, before a
// loss of power took their slots: they get a record that is not exact. A slot is on the disk
// within slotLate after the beginning of its epoch, so such windows began within that time
// after the end of the last epoch that has a slot.
func (j *journal) recreate() {
	last := j.newest
	if !j.powerLost {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for n := last.number + 1; ; n++ {
		o := opened{
			serial: j.newest.serial + 1, number: n, window: last.window,
			publisher: j.publisher, inexact: true, boot: j.boot,
		}
		i, free := j.freeSlot()
		if free == 0 || !o.start().Before(j.bootAt()) || !o.start().Before(time.Now()) || o.start().Sub(last.end()) >= slotLate {
			return
		}
		if !o.start().After(j.first.start) {
			continue // it has its record
		}
		o.slot = i
		j.write(&o)
		j.newest = o
		j.resumable = time.Now().Before(o.end())
	}
}

// salvage returns the epochs that were not published, the oldest first, as far as their slots
// in a damaged state file are whole.
func salvage(path string) (left []opened) {
	b, _ := os.ReadFile(path) // what cannot be read has none
	words := make([]uint64, marksAt/8)
	copy(bytesOf(words), b)
	for at := slotsAt / 8; at < len(words); at += slotWords {
		if o, ok := (*slot)(unsafe.Pointer(&words[at])).read(); ok && o.serial > 0 && !o.ended {
			left = append(left, o)
		}
	}
	slices.SortFunc(left, func(a, b opened) int {
		return cmp.Or(cmp.Compare(a.serial, b.serial), cmp.Compare(b.generation, a.generation))
	})
	left = slices.CompactFunc(left, func(a, b opened) bool { return a.serial == b.serial })
	return left[max(0, len(left)-slotCount+startSlots):]
}

// restore adds epochs whose ids are lost: their windows get records that are not exact.
func (j *journal) restore(left []opened) (err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	defer j.caught(&err, debug.SetPanicOnFault(true))
	for _, o := range left {
		i, free := j.freeSlot()
		if free == 0 {
			break // 1,024 epochs wait
		}
		j.newest = opened{
			serial: j.newest.serial + 1, number: o.number, window: o.window,
			publisher: o.publisher, inexact: true, boot: j.boot, slot: i,
		}
		j.write(&j.newest)
		j.resumable = false
	}
	return nil
}

// behind reports whether the directory is older than the records of this publisher, as an
// earlier copy of it is: an epoch has its slot, and its ids, before its record is published,
// except after the disk has failed.
func (j *journal) behind(published counter.Published) bool {
	n := &j.newest
	if n.serial == 0 || n.publisher != j.publisher || n.inexact {
		return false
	}
	if j.powerLost { // what was not yet on the disk is missing: recreate
		return n.end().Add(slotLate).Before(published.Last)
	}
	fewer := less(j.counts[n.serial].sum(), n.logged) < less(published.Unique, n.published)
	return n.start().Before(published.Last) || n.start().Equal(published.Last) && fewer
}

// guess restores the epoch of the last process if no slot of it could be read. That process had
// published each window at its end, so it was probably killed in the first window behind the
// last record, or behind its own start if that is later.
func (j *journal) guess(last time.Time, behind bool) {
	known, began := j.newest.serial > 0 && !behind, j.ran
	if behind || began.After(time.Now()) { // the start of the process that was copied; a clock was wrong
		began = time.Time{}
	}
	if !j.aside || known || j.Window == 0 || last.IsZero() && began.IsZero() {
		return
	}
	o := opened{window: j.Window, publisher: j.publisher}
	if !last.IsZero() {
		o.number = last.UnixNano()/int64(j.Window) + 1
	}
	if !began.IsZero() {
		o.number = max(o.number, began.UnixNano()/int64(j.Window))
	}
	if time.Now().Before(o.end()) {
		return // the epoch to be opened is not exact
	}
	_ = j.restore([]opened{o}) // it is kept in broken
}

// slotLate is the longest time from the beginning of an epoch until its slot is on the disk,
// also if the disk is busy.
const slotLate = 2 * time.Second

// PublishRecovered publishes what earlier processes have left in cfg.Dir, for a process
// that does not keep its ids there. report gets it before. Without a directory it does nothing,
// unless this publisher has records, which shows that there was one. A window
// that is still running can go on there, with its ids, in a later process.
func PublishRecovered(cfg Config, published map[string]counter.Published, report func(counter.Past), publish func(counter.Count) error) error {
	was := cfg.Dir != "" && hasState(cfg.Dir)
	if cfg.Dir == "" || !was && published[cfg.Publisher].Last.IsZero() {
		return nil
	}
	m := &Memory{cfg: cfg, check: make(chan struct{}, 1)}
	switch err := m.openJournal(); {
	case !was && errors.Is(err, errors.ErrUnsupported):
		return nil // its ids were never kept
	case err != nil:
		return err
	}
	j := m.journal
	defer j.close(true) // an error of the disk is kept in broken
	past := m.Past(published)
	report(past)
	for _, l := range past.Recovered {
		if err := publish(counter.Count{Start: l.Start, Window: l.Window, Unique: l.Unique, Exact: l.Exact, Keys: l.Keys, SealedAt: time.Now().UTC()}); err != nil {
			return err
		}
		l.State.Retire()
	}
	if broken := j.broken.Load(); broken != nil {
		return *broken
	}
	return nil
}
