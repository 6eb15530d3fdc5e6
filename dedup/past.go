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

// publisherOf returns a hash of the name of a publisher, which is never 0.
func publisherOf(name string) uint64 {
	sum := sha256.Sum256([]byte(name))
	return binary.LittleEndian.Uint64(sum[:]) | 1
}

// past returns what earlier processes left to be published. published has what each publisher
// has published, by its name.
//
// How many ids of an epoch no record has is computed as follows: the ids that the journal has,
// beyond the logged of its slot, less the ids that its publisher has published, beyond the
// published of its slot. logged and published are of the same moment, so it does not matter
// whether the last process was killed before or after it published its last record. If another
// publisher left something unpublished, this publisher takes it over.
//
// An epoch that may have lost ids gets a record even if no id is missing: the records that it
// has already are marked as exact. odd is not empty if the directory does not fit what this
// publisher has published, so that ids may be lost; it is the reason.
func (j *journal) past(published map[string]counter.Published) (past counter.Past, odd string) {
	defer j.caught(nil, debug.SetPanicOnFault(true)) // broken keeps the error
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
	if j.made && !j.aside && !(own.Last.IsZero() && j.Ran.IsZero()) {
		odd = "is missing, although ids were counted in it"
	} else if behind {
		odd = "is older than the last record: it is an earlier copy of the directory"
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

// recoveredEpoch is the State of an epoch whose ids an earlier process counted.
type recoveredEpoch struct {
	in *journal
	of slotOf
}

// Retire implements counter.State.
func (l recoveredEpoch) Retire() { l.in.end(l.of) }

// remainder is what an earlier process left unpublished of an epoch.
type remainder struct {
	have     uint64            // ids in the journal
	missing  uint64            // how many ids no record has
	doubtful bool              // ids of the epoch may be lost
	settled  bool              // the epoch needs no further record
	keys     counter.KeyCounts // the part of missing that is under keys
	keysLost bool              // it is not known which of them are under keys

	// lost is set if ids that no record has cannot be published any more; unpublished is their
	// number.
	lost        bool
	unpublished uint64
}

// remainder compares an epoch with what its publisher has published.
func (j *journal) remainder(o *opened, its counter.Published) (r remainder) {
	var sum uint64 // sum of the records for its window
	recorded := o.start().Equal(its.Last)
	if recorded {
		sum = its.Unique
	}
	l := j.counts[o.serial]
	r.have = l.sum()
	// If the spool was lost, sum may be less than published: less makes that 0.
	r.missing = less(less(r.have, o.logged), less(sum, o.published))
	// The labels that a publisher publishes increase: this one cannot publish for a window
	// before its last one.
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

// count sets how many of the missing ids are under each key. That is not known if the spool has
// lost the published counts by key, if the journal lacks the name of a key, or if the counts by
// key exceed all missing ids.
func (r *remainder) count(k *keyed, published publishedKeys) {
	if r.missing == 0 || k == nil {
		return
	}
	keys, sum, ok := k.counts(published.ids)
	if r.keys = keys; !ok || published.lost || sum > r.missing {
		r.keys, r.keysLost, r.doubtful = counter.KeyCounts{}, true, true
	}
}

// publishedKeys is what was published for a window by key.
type publishedKeys struct {
	ids  map[string]uint64
	lost bool // ids does not have all of it
}

// keysOf returns what all publishers together published by key, for each window, by its start
// in Unix ns.
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

// sumOf returns how many ids this publisher has published for the window of o, or will have
// when Past.Recovered is published.
func (j *journal) sumOf(o *opened) uint64 {
	if o.start().Equal(j.first.start) {
		return j.first.sum
	}
	return 0
}

// unsettled returns the epochs that are not ended, and the newest epoch in any case; the oldest
// comes first.
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

// adopt makes o, an epoch of another publisher, one of this publisher, which will publish what
// is missing. The new slot is on the disk before that. Otherwise, if this process is killed,
// the other publisher could publish the same ids once more.
func (j *journal) adopt(o *opened, logged, published uint64, doubtful bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	i, free := j.freeSlot()
	if free == 0 {
		return // slotCount epochs wait
	}
	before := *o
	o.logged, o.published, o.publisher = logged, published, j.publisher
	o.generation, o.inexact, o.boot, o.slot = o.generation+1, doubtful, j.boot, i
	j.write(o)
	if j.syncPart(stateName, j.state) != nil {
		return // broken keeps the error
	}
	if j.newest.serial == o.serial {
		j.newest = *o
	}
	j.free(before.slot)
}

// recreate makes slots for windows that may have begun, and whose ids may have been answered,
// before a loss of power took their slots. These windows get a record that is not exact. A slot
// is on the disk within slotLate after its epoch begins, so such windows began within slotLate
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
			continue // the window has a record
		}
		o.slot = i
		j.write(&o)
		j.newest = o
		j.resumable = time.Now().Before(o.end())
	}
}

// salvage returns the unpublished epochs, the oldest first, whose slots in a damaged state file
// are whole.
func salvage(path string) (left []opened) {
	b, _ := os.ReadFile(path) // a file that cannot be read has no epochs
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

// restore makes slots for epochs whose ids are lost, so that their windows get records, which
// are not exact.
func (j *journal) restore(left []opened) (err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	defer j.caught(&err, debug.SetPanicOnFault(true))
	for _, o := range left {
		i, free := j.freeSlot()
		if free == 0 {
			break // slotCount epochs wait
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

// behind reports whether the directory is older than the records of this publisher, which means
// that it is an earlier copy: except after a failure of the disk, an epoch has its slot and its
// ids in the journal before its record is published.
func (j *journal) behind(published counter.Published) bool {
	n := &j.newest
	if n.serial == 0 || n.publisher != j.publisher || n.inexact {
		return false
	}
	if j.powerLost { // what was not on the disk is missing, and recreate replaces it
		return n.end().Add(slotLate).Before(published.Last)
	}
	fewer := less(j.counts[n.serial].sum(), n.logged) < less(published.Unique, n.published)
	return n.start().Before(published.Last) || n.start().Equal(published.Last) && fewer
}

// guess restores the epoch in which the last process was killed if no slot could be read. last
// is the start of the last window that has a record. A process publishes each window at its
// end. So the last process was probably killed in the window after last, or, if it started
// later than that, in the window of its start.
func (j *journal) guess(last time.Time, behind bool) {
	known, began := j.newest.serial > 0 && !behind, j.ran
	if behind || began.After(time.Now()) { // ran belongs to the copied process, or a clock was wrong
		began = time.Time{}
	}
	if !j.aside || known || j.state == nil || j.Window == 0 || last.IsZero() && began.IsZero() {
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
		return // this process will open that epoch, as one that is not exact
	}
	_ = j.restore([]opened{o}) // broken keeps the error
}

// slotLate is the longest time from the beginning of an epoch until its slot is on the disk,
// even if the disk is busy.
const slotLate = 2 * time.Second

// PublishRecovered publishes what earlier processes left in cfg.Dir, for a process that does
// not keep its ids there. published is as in Memory.Past. report gets what was found, before
// publish is called for one count at a time, the oldest first. PublishRecovered returns the
// first error of publish, or an error if cfg.Dir cannot be opened. If cfg.Dir has no state file,
// and nothing shows that there was one, it does nothing. A window that is not over yet stays in
// cfg.Dir with its ids, and a later process can go on with it.
func PublishRecovered(cfg Config, published map[string]counter.Published, report func(counter.Past), publish func(counter.Count) error) error {
	was := cfg.Dir != "" && hasState(cfg.Dir)
	if cfg.Dir == "" || !was && published[cfg.Publisher].Last.IsZero() && cfg.Ran.IsZero() {
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
