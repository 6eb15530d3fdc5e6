package redis

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// This is a model of one epoch of a group: one lane and the ledger in Redis, as laneModel and
// ledgerModel have them, and the instances, whose ids change their state in state.on. A
// seeded scheduler drives it through faults.

const (
	modelEpoch = "1000000:100000"
	modelEnd   = 1100 // s
)

// modelEntry is an id that waits, as entry is.
type modelEntry struct {
	state
	id, seq int
}

// modelAdd is an id that was answered as new; todo: Redis has lost it.
type modelAdd struct {
	id, seq int
	todo    bool
}

type modelJob struct {
	batch   laneBatch
	entries []*modelEntry
	unknown bool
}

// modelMember is a process.
type modelMember struct {
	name     string
	instance int
	paused   bool

	// In the lane.
	seq          int
	gen          string
	job          *modelJob
	entries      []*modelEntry
	known        map[int]bool // repeats of these make no trip
	log          []modelAdd
	uncertain    int  // ids that were refused, or soon will be, and may be in Redis
	wasUncertain bool // there were some
	took         int  // the last batch that took ids back
	blind        int  // those that were refused since the ledger was reached last
	lost         bool // ids are to be added again
	losing       bool // it is to say hello: kept is what came before the loss
	kept         int

	// In the ledger.
	inside                       bool    // the ledger was reached
	beaten                       int64   // by the last beat
	opened, registered, reported bool    // the epoch
	turned                       bool    // it has opened the next one
	rows                         answers // as it remembers them
	listed                       []string
}

// modelRules are the repairs that a test can take out.
type modelRules struct {
	account      bool // the sum of the answers is compared with the ids
	identity     bool // another identity of the data is noted as a loss
	sessions     bool // an absent session must be in the hash
	helloFreezes bool // hello notes the loss and freezes the lane
	memory       bool // members write again what others have answered
	disk         bool // and keep it over a restart
	whole        bool // what members that are gone have answered is inferred from lanes that are whole
	doubts       bool // a member that refused ids that may be in Redis is not vouched for
	announce     bool // the group knows of such ids before their requests are refused
	took         bool // ids without an answer stay in doubt when they are lost, or their removal
	late         bool // a member that the ledger does not have in the epoch may have answered ids
	unanswered   bool // the last ids of a member that is gone may have had no answer
	asOf         bool // one that has lost data since the last beat of a member is not believed by it
	listed       bool // what was lost since the lanes were sealed is not decided on
	strangers    bool // members remember epochs that they did not open
	removed      bool // a member that has only refused ids is in the account
	back         bool // after an outage of the ledger a seal waits for the others to be heard
	behind       bool // and who learns that it has waits for the others to be heard
	start        bool // after its start a member waits for the others to be heard before it seals
	names        bool // members list the others again
}

var allRules = modelRules{true, true, true, true, true, true, true, true, true, true, true, true, true, true, true, true, true, true, true, true}

type model struct {
	rnd       *rand.Rand
	rules     modelRules
	lane      *laneModel
	ledger    *ledgerModel
	oldLane   *laneModel // what a replica, or a file, has
	oldLedger *ledgerModel
	down      bool // the ledger is out of reach
	outage    bool // or was
	members   []*modelMember
	dead      []*modelMember // killed, or stopped
	disks     [3]answers
	ok        map[int]int // how often each id was answered as new
	answers   int
	next      int  // identity, name
	replies   int  // of so many one is lost
	quiet     bool // there are no more requests
	scene     scene
	without   [11]bool // kinds of steps that this schedule does not have
	trace     []string
	traced    bool
}

func newModel(seed uint64, rules modelRules) *model {
	w := &model{
		rnd: rand.New(rand.NewPCG(seed, 1)), rules: rules, lane: newLaneModel(), ledger: newLedgerModel(),
		disks: [3]answers{{}, {}, {}}, ok: map[int]int{},
	}
	w.lane.rules, w.ledger.rules = rules, rules
	w.pass(995)
	// With fewer kinds of faults each schedule has more of the others: Groce et al., "Swarm
	// Testing", 2012.
	w.replies = pick(w.rnd, 2, 5, 5, 5)
	for kind := range w.without[1:] {
		w.without[1+kind] = seed%4 != 0 && w.rnd.IntN(3) == 0
	}
	return w
}

func (w *model) fresh() int { w.next++; return w.next }

func (w *model) note(f string, args ...any) {
	if w.traced {
		w.trace = append(w.trace, fmt.Sprintf(f, args...))
	}
}

func (w *model) pass(seconds float64) {
	w.lane.now += seconds
	w.ledger.now = int64(1000 * w.lane.now)
}

// start is the start of an instance: it is in the hash and in the ledger before its
// first answer.
func (w *model) start(instance int) {
	name := instance % 2 // two of three have one name, which an operator should not do
	m := &modelMember{name: fmt.Sprintf("%08d-%d", name, w.fresh()), instance: instance, known: map[int]bool{}, rows: answers{}}
	if w.rules.disk {
		m.rows.learn(w.disks[instance])
	}
	w.members = append(w.members, m)
	w.beat(m)
	w.clear(m)
	w.note("start %d as %s", instance, m.name)
}

// second is the second after a start, a pause, or a loss, in which all beat: see DESIGN.md, known
// gaps.
func (w *model) second() {
	for range 2 {
		for _, m := range w.members {
			if !m.paused {
				w.beat(m)
			}
		}
	}
}

// onlyDisksKnow reports whether a member that is gone has a part in the epoch of which neither
// the ledger nor another member knows.
func (w *model) onlyDisksKnow() bool {
	known := rowsOf(w.ledger.of[modelEpoch])
	for _, m := range w.members {
		if !m.paused {
			known.learn(m.rows)
		}
	}
	for _, disk := range w.disks {
		for name := range disk {
			if _, member := w.ledger.members[name]; known[name] == "" && !member {
				return true
			}
		}
	}
	return false
}

// heartbeat is what each beat of a member has.
func (m *modelMember) heartbeat() ledgerBeat {
	b := ledgerBeat{me: m.name, claims: true, unsettled: m.unsettled(), window: "100000", opened: "900000", at: -1, listed: m.listed}
	if m.inside {
		b.at = m.beaten
	}
	if m.turned {
		b.opened = "1100000"
	} else if m.opened {
		b.opened = "1000000"
	}
	return b
}

// beat exchanges what is known of the answers. It returns whether the ledger has lost data since
// the last one.
func (w *model) beat(m *modelMember) (behind bool) {
	w.keep(m, strconv.Itoa(len(m.log))+"+")
	if w.down {
		return false
	}
	b := m.heartbeat()
	if w.rules.strangers {
		b.unnamed = 1
	}
	// The epoch is in the first beat, or in the next one, which follows at once.
	for named := len(m.rows) > 0; ; named = true {
		if named {
			known := m.rows
			if own := m.rows[m.name]; !w.rules.memory {
				if known = (answers{}); own != "" {
					known[m.name] = own
				}
			}
			b.epochs = []ledgerEpochBeat{{
				name: modelEpoch, ends: modelEnd * 1000, had: m.registered, asks: len(m.rows) == 0 && !m.registered, uncertain: m.uncertain > 0 && !strings.HasSuffix(known[m.name], "?"), known: known,
			}}
			if m.reported {
				b.epochs[0].reported = &ledgerReport{true, true, "0"}
			}
		}
		m.blind, m.inside, m.beaten = 0, true, w.ledger.now
		a := w.ledger.beat(b)
		b.at, behind = m.beaten, behind || a.behind
		m.listed = append(a.others, a.silent...)
		if b.listed = m.listed; !w.rules.names {
			m.listed, b.listed = nil, nil
		}
		if named {
			m.registered = true
			if w.rules.memory {
				m.rows.learn(a.known[0])
			}
		}
		if len(a.unnamed) == 0 {
			return behind
		}
	}
}

// keep notes the answers of a member, and writes what it knows to its disk.
func (w *model) keep(m *modelMember, n string) {
	if m.opened {
		m.rows.note(m.name, n)
	}
	w.disks[m.instance].learn(m.rows)
}

func (m *modelMember) unsettled() string {
	if m.lost || len(m.entries) > 0 || m.job != nil && m.job.batch.mode != "b" {
		return "1000000 1000000"
	}
	return ""
}

// step has an entry take a step, as lane.step.
func (w *model) step(m *modelMember, en *modelEntry, e event) {
	was := en.state
	next, fx := en.on(e)
	if en.state = next; next.uncertain && !was.uncertain {
		m.uncertain++
		m.wasUncertain = true
	} else if was.uncertain && !next.uncertain {
		m.uncertain--
	}
	if fx.log == asTaken { // and answered as new
		m.log = append(m.log, modelAdd{id: en.id, seq: m.seq})
		w.ok[en.id]++
		w.answers++
	}
	m.known[en.id] = m.known[en.id] || fx.known
	if en.phase == finished {
		m.entries = slices.DeleteFunc(m.entries, func(x *modelEntry) bool { return x == en })
	}
}

func (w *model) stepAll(m *modelMember, entries []*modelEntry, e event) {
	for _, en := range slices.Clone(entries) {
		w.step(m, en, e)
	}
}

// refuse gives up the wait for an entry: its request gets 503. It returns false if the
// instance is killed in that moment.
func (w *model) refuse(m *modelMember, en *modelEntry) bool {
	if w.rules.announce {
		if w.step(m, en, eventRefused); en.uncertain {
			w.beat(m)
		}
	}
	en.waiting = noRequest
	w.note("    %s refuses %d", m.name, en.id)
	w.step(m, en, eventRefused)
	if w.step(m, en, eventAnsweredBeside); !en.uncertain {
		return true
	}
	if w.down {
		m.blind++
	}
	if w.rnd.IntN(4) == 0 {
		w.kill(m)
		return false
	}
	if !w.rules.announce {
		w.beat(m)
	}
	return true
}

func (w *model) kill(m *modelMember) {
	w.members = slices.DeleteFunc(w.members, func(x *modelMember) bool { return x == m })
	w.dead = append(w.dead, m)
	w.note("%s is killed", m.name)
}

// choose is choose of the lane.
func (m *modelMember) choose() *modelJob {
	j := &modelJob{batch: laneBatch{session: m.name, mode: "b", epoch: modelEpoch, whole: true, tick: true, before: "900000:100000", after: "1100000:100000"}}
	take := func(mode string, from phase, e event) bool {
		for _, en := range m.entries {
			if en.phase == from {
				en.state, _ = en.on(e)
				j.batch.mode = mode
				j.batch.ids[0] = append(j.batch.ids[0], strconv.Itoa(en.id))
				j.entries = append(j.entries, en)
			}
		}
		return len(j.entries) > 0
	}
	switch {
	case take("r", unanswered, eventSent):
	case m.lost:
		j.batch.mode = "p"
		for _, a := range m.log {
			if a.todo {
				j.batch.ids[0] = append(j.batch.ids[0], strconv.Itoa(a.id))
			}
		}
	default:
		take("a", queued, eventSent)
	}
	return j
}

// progress sends a batch. If the reply is lost, it is sent again until its outcome is known.
func (w *model) progress(m *modelMember, replyLost bool) {
	j := m.job
	if j == nil {
		j = m.choose()
		m.job = j
	}
	j.batch.seq, j.batch.expect, j.batch.uncertain = m.seq+1, m.gen, m.uncertain > 0
	a := w.lane.batch(j.batch)
	if w.traced {
		w.note("    %s sends %s %d %v: %v, lost %t, in doubt %d; the ledger: %v", m.name, j.batch.mode, j.batch.seq, j.batch.ids[0], a, replyLost, m.uncertain, w.ledger.of[modelEpoch])
	}
	if replyLost {
		j.unknown = true
		return
	}
	switch a.status {
	case "ok":
		m.job, m.losing, m.gen = nil, false, a.gen
		m.seq++
		w.resolve(m, j, a.codes)
	case "sealed":
		m.job = nil
		w.stepAll(m, m.entries, eventSealed)
	case "frozen":
		w.dissolve(m, j)
	default:
		w.recover(m, j, a, w.rnd.IntN(6) == 0)
	}
}

// resolve is resolve of the lane.
func (w *model) resolve(m *modelMember, j *modelJob, codes string) {
	if j.batch.mode == "r" {
		m.took = m.seq
	}
	for i, en := range j.entries {
		en.seq = m.seq
		e := map[byte]event{'0': eventThere, '1': eventAdded, '2': eventInDoubt, '5': eventBelieved}[codes[i]]
		if j.batch.mode == "r" && codes[i] == '1' {
			e = eventGone
		}
		w.step(m, en, e)
	}
	if j.batch.mode == "p" {
		m.lost = false
		for i := range m.log {
			if m.log[i].todo {
				m.log[i].todo, m.log[i].seq = false, m.seq
			}
		}
	}
}

func (w *model) dissolve(m *modelMember, j *modelJob) {
	if !j.unknown {
		m.job = nil
		w.stepAll(m, j.entries, eventUndone)
	}
}

// recover is recover of the lane: m goes on after a loss.
func (w *model) recover(m *modelMember, j *modelJob, a laneAnswer, replyLost bool) {
	switch {
	case a.status == "lost":
		m.losing, m.kept = true, 0
	case a.status == "gap" && (!m.losing || a.n < m.kept):
		m.losing, m.kept = true, a.n
	}
	if w.lane.hello(m.name, a.n, m.seq+seqSkip); replyLost {
		return
	}
	m.seq += seqSkip
	if m.losing {
		for i := range m.log {
			m.log[i].todo = m.log[i].todo || m.log[i].seq > m.kept
		}
		if w.rules.took && (m.kept < m.took || j.unknown && j.batch.mode == "a") {
			m.uncertain++
		}
		if m.kept == 0 {
			m.gen = ""
		}
		m.lost = true
	}
	for _, en := range slices.Clone(m.entries) {
		if m.losing && en.seq > m.kept && (en.phase == unanswered || en.phase == taking) {
			if w.rules.took {
				m.uncertain++
			}
			w.step(m, en, eventGone)
			j.entries = slices.DeleteFunc(j.entries, func(x *modelEntry) bool { return x == en })
		}
	}
	m.losing, j.unknown = false, false
	w.dissolve(m, j)
}

// clear sends batches until nothing is left to be sent, and the session was heard.
func (w *model) clear(m *modelMember) {
	for range 6 {
		w.progress(m, false)
		if m.unsettled() == "" {
			break
		}
	}
	w.progress(m, false)
}

// add is a request with an id.
func (w *model) add(m *modelMember, id int, replyLost bool) {
	if !m.inside {
		return
	}
	if !m.opened {
		m.opened = true
		w.beat(m)
	}
	if i := slices.IndexFunc(m.entries, func(en *modelEntry) bool { return en.id == id }); i >= 0 {
		if m.entries[i].phase == unanswered {
			w.step(m, m.entries[i], eventAskedAgain)
		}
		return
	}
	if m.known[id] {
		return
	}
	en := &modelEntry{id: id, state: state{waiting: itsAttempt}}
	m.entries = append(m.entries, en)
	for range 3 { // what is under way goes first
		w.progress(m, replyLost && m.job == nil && !m.lost)
		if en.phase != queued {
			break
		}
	}
	if en.phase != finished && w.rnd.IntN(2) == 0 {
		w.refuse(m, en)
	}
}

// work is what a member does by itself.
func (w *model) work(m *modelMember) {
	for _, en := range slices.Clone(m.entries) {
		if en.waiting != noRequest && w.rnd.IntN(2) == 0 && !w.refuse(m, en) {
			return
		}
	}
	w.progress(m, w.rnd.IntN(6) == 0)
}

// report leaves the epoch.
func (w *model) report(m *modelMember) {
	for _, en := range slices.Clone(m.entries) { // nobody waits any more
		if en.waiting != noRequest && !w.refuse(m, en) {
			return
		}
	}
	if w.rnd.IntN(2) == 0 {
		w.clear(m)
	}
	n := strconv.Itoa(len(m.log))
	if m.uncertain > 0 || w.rules.removed && m.wasUncertain && n == "0" {
		n += "?"
	}
	w.keep(m, n)
	m.reported = m.opened
	w.beat(m)
}

// stop is SIGTERM. If the ledger is out of reach, the disk alone has the number.
func (w *model) stop(m *modelMember) {
	if w.report(m); !slices.Contains(w.members, m) {
		return // killed meanwhile
	}
	if !w.down {
		w.ledger.leave(m.name, m.unsettled())
	}
	w.members = slices.DeleteFunc(w.members, func(x *modelMember) bool { return x == m })
	w.dead = append(w.dead, m)
	w.note("%s stops", m.name)
}

// stepKinds are what random does: each kind ends before its number of 100.
var stepKinds = []int{60, 70, 75, 78, 82, 85, 88, 91, 93, 97, 100}

// random does something at random.
func (w *model) random() {
	r := w.rnd
	w.pass([]float64{0, 0, 0.25, 0.5, 2}[r.IntN(5)])
	if len(w.members) == 0 {
		w.start(r.IntN(3))
		return
	}
	m := w.members[r.IntN(len(w.members))]
	n := r.IntN(100)
	if kind, _ := slices.BinarySearch(stepKinds, n+1); w.without[kind] {
		n %= 60 // a request or a heartbeat
	}
	if w.quiet && n < 45 {
		n = 45
	}
	switch {
	case n < 45 && !m.paused:
		id := r.IntN(12)
		w.note("%s: a request with %d", m.name, id)
		w.add(m, id, n%w.replies == 0)
	case n >= 45 && n < 60 && !m.paused:
		w.note("%s beats", m.name)
		w.beat(m)
	case n >= 60 && n < 70 && !m.paused:
		w.note("%s works", m.name)
		w.work(m)
	case n >= 70 && n < 75:
		w.kill(m)
	case n >= 75 && n < 78 && !m.paused:
		w.stop(m)
	case n >= 78 && n < 82:
		if instance := r.IntN(3); !slices.ContainsFunc(w.members, func(x *modelMember) bool { return x.instance == instance }) {
			w.start(instance)
		}
	case n >= 82 && n < 85:
		m.paused = !m.paused
		w.note("%s pauses: %t", m.name, m.paused)
		w.second()
	default:
		w.fault(n)
	}
}

// scene is a sequence of steps that random has too seldom.
type scene int

const (
	noScene     scene = iota
	sceneRefuse       // a member refuses an id that a replica has, and goes
	sceneLose         // a member adds an id, notices that Redis has lost it, and is killed
	sceneLate         // a member refuses an id too late to take it back, and stops before the seal
	sceneStart        // Redis loses its data at the end, and a member that has just started seals
)

// play plays the scene of the schedule, if there is one, but for sceneLate.
func (w *model) play() {
	i := slices.IndexFunc(w.members, func(m *modelMember) bool { return !m.paused })
	if i < 0 {
		return
	}
	m := w.members[i]
	switch w.scene {
	case sceneRefuse:
		w.refusal(m)
	case sceneLose:
		down := w.down
		w.down = down || w.rnd.IntN(2) == 0
		w.outage = w.outage || w.down
		w.outage = w.outage || w.down
		w.note("%s: a request; the ledger is out of reach: %t", m.name, w.down)
		w.add(m, w.rnd.IntN(12), false)
		w.fault(pick(w.rnd, faultFlush, faultLane, faultFailover))
		w.progress(m, false)
		w.kill(m)
		w.down = down
	}
}

// refusal is sceneRefuse. The replica may become the master.
func (w *model) refusal(m *modelMember) {
	for _, other := range slices.Clone(w.members) {
		if other != m && !other.paused && w.rnd.IntN(2) == 0 {
			w.add(other, w.rnd.IntN(12), false)
		}
	}
	down := w.down
	w.down = down || w.rnd.IntN(2) == 0
	w.outage = w.outage || w.down
	w.note("%s: a request; the ledger is out of reach: %t", m.name, w.down)
	w.add(m, w.rnd.IntN(12), true)
	w.fault(faultCopy)
	for _, en := range slices.Clone(m.entries) {
		if en.waiting != noRequest && !w.refuse(m, en) {
			break
		}
	}
	w.down = down
	if !slices.Contains(w.members, m) {
		return // killed meanwhile
	}
	if w.rnd.IntN(2) == 0 {
		w.clear(m)
	}
	failover := w.rnd.IntN(3) // 0: before the member goes, 1: after that, 2: neither
	if failover == 0 {
		w.fault(faultFailover)
		w.clear(m)
	}
	if w.rnd.IntN(2) == 0 {
		w.stop(m)
	} else {
		w.beat(m)
		w.kill(m)
	}
	if failover == 1 {
		w.meet()
		w.fault(faultFailover)
		w.meet() // they notice the loss
		w.meet() // after which all have to be heard
		if i := len(w.members) - 1; i >= 0 && w.rnd.IntN(2) == 0 {
			w.kill(w.members[i])
		}
	}
	w.quiet = w.rnd.IntN(2) == 0
}

// meet has each member reach the lane and the ledger.
func (w *model) meet() {
	for _, m := range w.members {
		if !m.paused {
			w.clear(m)
			w.beat(m)
		}
	}
}

// The faults, each by one of its numbers of 100.
const (
	faultCopy     = 87
	faultFlush    = 90
	faultLane     = 92
	faultFailover = 96
	faultLedger   = 99
)

// fault is what befalls Redis.
func (w *model) fault(n int) {
	lane, ledger := newLaneModel(), newLedgerModel()
	switch {
	case n < 85:
		return
	case n < 88:
		w.oldLane, w.oldLedger = w.lane.clone(), w.ledger.clone()
		w.note("a replica has all")
		return
	case n < 91:
		w.note("FLUSHALL")
		lane.identity = w.lane.identity
	case n < 93:
		w.note("the lane is lost, the ledger is not")
		lane.identity, ledger = w.lane.identity, w.ledger
	case n < 97 && w.oldLane != nil:
		w.note("failover to what the replica has")
		lane, ledger = w.oldLane.clone(), w.oldLedger.clone()
		lane.identity = strconv.Itoa(w.fresh())
	default:
		w.down = !w.down
		w.outage = true
		w.note("the ledger is out of reach: %t", w.down)
		return
	}
	w.lose(lane, ledger)
	w.second()
}

// lose has Redis go on with other data.
func (w *model) lose(lane *laneModel, ledger *ledgerModel) {
	lane.now, lane.rules, ledger.rules = w.lane.now, w.rules, w.rules
	w.lane, w.ledger = lane, ledger
	w.pass(0)
}

// starts plays sceneStart and returns the member that has started, or nil. The others have not
// been heard since the loss.
func (w *model) starts() *modelMember {
	i := slices.IndexFunc(w.members, func(m *modelMember) bool { return !m.paused })
	if w.scene != sceneStart || i < 0 {
		return nil
	}
	instance := (w.members[i].instance + 1) % 3
	for _, m := range slices.Clone(w.members) {
		if m.instance == instance {
			w.kill(m)
		}
	}
	w.note("FLUSHALL, and %d starts", instance)
	w.down = false
	lane := newLaneModel()
	lane.identity = w.lane.identity
	w.lose(lane, newLedgerModel())
	w.start(instance)
	return w.members[len(w.members)-1]
}

// late is the member of sceneLate, or nil. Its last id has no answer yet.
func (w *model) late() *modelMember {
	i := slices.IndexFunc(w.members, func(m *modelMember) bool { return !m.paused })
	j := len(w.members) - 1
	if w.scene != sceneLate || i < 0 || i == j || w.members[j].paused {
		return nil
	}
	m := w.members[j]
	w.note("%s: a late request", m.name)
	w.add(m, w.rnd.IntN(12), true)
	return m
}

// seal ends the epoch and decides.
func (w *model) seal() *ledgerDecision {
	late := w.late()
	// See DESIGN.md, known gaps: those with a disk are started.
	w.pass(max(0, modelEnd-w.lane.now) + 4) // the last clock has turned
	starts := w.starts()
	back := []*modelMember{}
	if w.onlyDisksKnow() || !slices.ContainsFunc(w.members, func(m *modelMember) bool { return !m.paused }) {
		w.down = false
		for instance := range 3 {
			w.members = slices.DeleteFunc(w.members, func(m *modelMember) bool {
				if m.paused && m.instance == instance {
					w.dead = append(w.dead, m)
				}
				return m.paused && m.instance == instance
			})
			if !slices.ContainsFunc(w.members, func(m *modelMember) bool { return m.instance == instance }) {
				w.start(instance)
			}
		}
	}
	for _, m := range w.members {
		if m == starts {
			back = slices.Insert(back, 0, m)
		} else if !m.paused {
			back = append(back, m)
		}
	}
	if w.down && !w.rules.back {
		back = back[:1] // the others are still to reach the ledger
	}
	w.down = false
	for i, m := range back {
		if starts != nil && i > 0 && !w.rules.start {
			continue
		}
		if i == 0 || w.outage || starts != nil || w.rnd.IntN(4) > 0 { // else it beats next second
			w.beat(m)
		}
	}
	for _, m := range slices.Clone(back) {
		if m == late {
			continue
		}
		if w.rnd.IntN(2) == 0 {
			w.progress(m, false)
		}
		if w.rnd.IntN(6) > 0 {
			w.report(m)
		}
	}
	for i, m := range slices.Clone(back) {
		if i > 0 && m != late && !m.opened && slices.Contains(w.members, m) {
			w.note("%s opens the epoch only now", m.name)
			w.add(m, w.rnd.IntN(12), false)
		}
	}
	losses := 4 // one of so many
	if slices.Contains(w.members, late) {
		w.stop(late)
		back = slices.DeleteFunc(back, func(m *modelMember) bool { return m == late })
		losses = 2
	}
	lose := func() {
		if w.rnd.IntN(losses) > 0 {
			return
		}
		lost := newLedgerModel()
		if w.oldLedger != nil && w.rnd.IntN(2) == 0 {
			lost = w.oldLedger.clone()
		}
		lost.now, lost.rules = w.ledger.now, w.rules
		was := w.ledger
		if w.ledger = lost; w.onlyDisksKnow() { // see DESIGN.md, known gaps
			w.ledger = was
			return
		}
		w.note("the ledger has lost data")
	}
	lose()
	sealer := func() (name string, at int64, known answers) {
		for _, m := range back {
			if slices.Contains(w.members, m) && w.rules.asOf {
				return m.name, m.beaten, m.rows
			}
		}
		return "", 0, nil // it has left
	}
	act := func(seconds float64) {
		w.pass(seconds)
		behind := false
		for i, m := range back {
			switch {
			case !slices.Contains(w.members, m):
				continue
			case i > 0 && !behind && w.rnd.IntN(4) == 0: // it beats next second
			default:
				m.turned = m.turned || w.rnd.IntN(2) == 0
				behind = w.beat(m) && w.rules.behind || behind
			}
			w.clear(m)
		}
	}
	for {
		if len(back) > 1 && w.rnd.IntN(4) == 0 {
			w.stop(back[1])
			back = slices.Delete(back, 1, 2)
		}
		me, at, known := sealer()
		d, wait, members := w.ledger.seal(modelEpoch, me, at, known)
		if d != nil {
			return d
		}
		if members == nil {
			act(min(float64(wait)/1000, 0.5))
			continue
		}
		status, ids := w.lane.seal(modelEpoch, false, sessions(members))
		if status == "sealed" {
			ids.whole = ids.whole || !w.rules.whole
			w.note("sealed: %+v, %v", ids, w.ledger.of[modelEpoch])
			lose()
			if late != nil || w.rnd.IntN(2) == 0 {
				act(0) // heartbeats
			}
			me, at, _ := sealer()
			if d := w.ledger.decide(modelEpoch, ids, true, false, me, at, members); d != nil {
				return d
			}
		}
		act(0.5)
	}
}

// runModel runs a schedule and returns what is wrong with its record, if anything, with the
// steps that lead there.
func runModel(seed uint64, rules modelRules) (fault string, trace []string) {
	if fault, _ = tryModel(seed, rules, false); fault != "" {
		return tryModel(seed, rules, true)
	}
	return "", nil
}

func tryModel(seed uint64, rules modelRules, traced bool) (fault string, trace []string) {
	w := newModel(seed, rules)
	w.traced = traced
	for instance := range pick(w.rnd, 1, 2, 2, 3) {
		w.start(instance)
	}
	if w.rnd.IntN(8) == 0 { // before the epoch is opened
		w.fault(faultLedger)
	}
	w.scene = pick(w.rnd, noScene, noScene, noScene, sceneRefuse, sceneRefuse, sceneLose, sceneLate, sceneLate, sceneLate, sceneStart)
	at, steps := w.rnd.IntN(pick(w.rnd, 1, 10)), 10+w.rnd.IntN(40)
	if w.scene == sceneLate {
		steps /= 3 // after most of the faults that may come before it no record is exact
	}
	for i := range steps {
		if w.random(); i == at {
			w.play()
		}
	}
	d := w.seal()
	if d.exact != "1" {
		return "", nil
	}
	for id, n := range w.ok {
		if n > 1 {
			return fmt.Sprintf("id %d was answered as new %d times, the record is exact", id, n), w.trace
		}
	}
	if n, _ := strconv.Atoi(d.unique); n != w.answers {
		return fmt.Sprintf("%d answers: the record is exact, %s", w.answers, d.unique), w.trace
	}
	return "", nil
}

// TestExactRecordsAreRightInEverySchedule: whatever the sequence of kills, stops,
// restarts, pauses, losses of data, failovers to an older state and back, and lost
// replies, a record that says exact has the number of the answers, and no id of it was
// answered as new twice. VERVE_TEST_SCHEDULES is how many are tried,
// VERVE_TEST_SEED the first of them.
func TestExactRecordsAreRightInEverySchedule(t *testing.T) {
	schedules := 5000
	if n, err := strconv.Atoi(os.Getenv("VERVE_TEST_SCHEDULES")); err == nil {
		schedules = n
	}
	for seed := firstSeed(); schedules > 0; seed, schedules = seed+1, schedules-1 {
		if fault, trace := runModel(seed, allRules); fault != "" {
			t.Fatalf("seed %d: %s\n%s", seed, fault, strings.Join(trace, "\n"))
		}
	}
}

func firstSeed() uint64 {
	first, _ := strconv.ParseUint(os.Getenv("VERVE_TEST_SEED"), 10, 64)
	return first
}

// TestEachRuleOfTheAccountIsNeeded: without it a schedule is found in which a record
// that says exact is wrong. VERVE_TEST_SEED is the first schedule.
func TestEachRuleOfTheAccountIsNeeded(t *testing.T) {
	const within = 10_000 // schedules
	for _, tt := range []struct {
		name string
		out  func(*modelRules)
	}{
		{"account", func(r *modelRules) { r.account = false }},
		{"identity of the data", func(r *modelRules) { r.identity = false }},
		{"sessions in the hash", func(r *modelRules) { r.sessions = false }},
		{"hello freezes the lane", func(r *modelRules) { r.helloFreezes = false }},
		{"memory of the others", func(r *modelRules) { r.memory = false }},
		{"disk", func(r *modelRules) { r.disk = false }},
		{"whole lanes", func(r *modelRules) { r.whole = false }},
		{"refused ids of dead members", func(r *modelRules) { r.doubts = false }},
		{"removals that are lost", func(r *modelRules) { r.took = false }},
		{"members that are late", func(r *modelRules) { r.late = false }},
		{"last ids of dead members", func(r *modelRules) { r.unanswered = false }},
		{"what the last beat wrote", func(r *modelRules) { r.asOf = false }},
		{"others come back", func(r *modelRules) { r.back = false }},
		{"members that only refused ids", func(r *modelRules) { r.removed = false }},
		// Either is enough in the one epoch of the model.
		{"others come back, or are listed again, after a loss", func(r *modelRules) { r.behind, r.names = false, false }},
		{"others come back after a start", func(r *modelRules) { r.start = false }},
		{"numbers that were listed", func(r *modelRules) { r.listed = false }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rules := allRules
			tt.out(&rules)
			for n := range uint64(within) {
				if fault, _ := runModel(firstSeed()+n, rules); fault != "" {
					t.Logf("found after %d schedules: %s", n+1, fault)
					return
				}
			}
			t.Errorf("%d schedules do not miss it", within)
		})
	}
}
