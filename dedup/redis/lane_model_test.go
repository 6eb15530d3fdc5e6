package redis

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
)

// laneModel is a model of lane.lua: a lane in Redis. TestTheScriptsDoWhatTheModelsDo
// holds the real code to it, and model_test.go drives it.
type laneModel struct {
	now      float64 // s, by the clock of the master
	identity string  // of the data
	rules    modelRules

	// The hash of the lane.
	sessions  map[string]laneSession
	doubt     map[string][]string // ids of the last batch of a session; absent: the doubt has lapsed
	uncertain map[string]bool     // sessions that have refused other ids that may be in Redis
	active    []string
	open      map[string]laneOpen
	tokens    map[string]int // how many each epoch has
	sealed    []laneSealed
	freeze    float64 // 0: none
	loss      float64
	losses    int
	known     string // the identity that is noted
	born      float64

	sets map[string]laneSets // of each epoch
}

type laneSession struct {
	seq        int
	at         float64
	codes, gen string
	n          int
	epoch      string
	losses     int
}

// laneOpen is an open epoch: its numbers are by the letter of their key.
type laneOpen struct {
	gen     string
	sizes   map[string]int
	inexact int
}

type laneSealed struct {
	epoch           string
	n, exact, whole int
	until           float64
	under           int
	unanswered      int
	sessions        []string
}

// laneSets are the keys of an epoch: d, u, t, h, k and x are sets, n is a hash.
type laneSets map[string]map[string]int

func newLaneModel() *laneModel {
	return &laneModel{
		identity: "1", rules: allRules, sessions: map[string]laneSession{}, doubt: map[string][]string{}, uncertain: map[string]bool{}, open: map[string]laneOpen{},
		tokens: map[string]int{}, sets: map[string]laneSets{},
	}
}

func (s laneSets) clone() laneSets {
	c := laneSets{}
	for k, set := range s {
		c[k] = maps.Clone(set)
	}
	return c
}

func (m *laneModel) clone() *laneModel {
	c := *m
	c.sessions, c.doubt, c.uncertain, c.tokens = maps.Clone(m.sessions), maps.Clone(m.doubt), maps.Clone(m.uncertain), maps.Clone(m.tokens)
	c.active, c.sealed = slices.Clone(m.active), slices.Clone(m.sealed)
	c.open, c.sets = map[string]laneOpen{}, map[string]laneSets{}
	for epoch, o := range m.open {
		o.sizes = maps.Clone(o.sizes)
		c.open[epoch] = o
	}
	for epoch, sets := range m.sets {
		c.sets[epoch] = sets.clone()
	}
	return &c
}

// of returns the keys of an epoch, to be changed.
func (m *laneModel) of(epoch string) laneSets {
	if m.sets[epoch] == nil {
		m.sets[epoch] = laneSets{}
	}
	return m.sets[epoch]
}

func (s laneSets) put(k, id string, n int) {
	if s[k] == nil {
		s[k] = map[string]int{}
	}
	s[k][id] = n
}

func (s laneSets) has(k, id string) bool { _, there := s[k][id]; return there }

const laneKinds = "duthk"

// laneNamed is an id with a token or a key.
type laneNamed struct{ kind, id, token, key string }

// laneBatch is what a batch sends.
type laneBatch struct {
	session       string
	seq           int
	mode          string
	epoch, expect string
	whole, tick   bool
	uncertain     bool
	ids           [4][]string // of the first four kinds
	named         []laneNamed
	before, after string
	maxKeys       int
	tokensLost    bool
}

// laneAnswer is what the script answers.
type laneAnswer struct {
	status, codes, gen string
	n                  int
}

func (a laneAnswer) String() string {
	switch a.status {
	case "missing", "frozen", "sealed":
		return "[" + a.status + "]"
	}
	return fmt.Sprint([]any{a.status, a.codes, a.gen, a.n})
}

func luaNumber(f float64) string { return fmt.Sprintf("%.14g", f) }

func (m *laneModel) frozen() bool {
	if left := m.freeze - m.now; left > 0 && left < 5 {
		return true
	}
	m.freeze = 0
	return false
}

func (m *laneModel) noteLoss() int {
	m.losses++
	m.loss = m.now
	return m.losses
}

func (m *laneModel) identify() {
	if m.known != "" && m.known != m.identity && m.rules.identity {
		m.noteLoss()
	}
	m.known = m.identity
	if m.born == 0 {
		m.born = m.now
	}
}

func (m *laneModel) over(epoch string) *laneSealed {
	for i := range m.sealed {
		if m.sealed[i].epoch == epoch {
			return &m.sealed[i]
		}
	}
	return nil
}

func (m *laneModel) join(session string, isNew bool) {
	for _, other := range m.active {
		if other == session {
			return
		}
		if isNew && other[:min(8, len(other))] == session[:min(8, len(session))] && (len(m.doubt[other]) > 0 || m.uncertain[other]) {
			delete(m.doubt, other)
		}
	}
	m.active = append(m.active, session)
}

// doubts are the ids in doubt of other sessions, in an epoch or in all.
func (m *laneModel) doubts(session, epoch string) (found []string) {
	m.active = slices.DeleteFunc(slices.Clone(m.active), func(other string) bool {
		s, is := m.sessions[other]
		if other == session || is && math.Abs(m.now-s.at) < 10 {
			if other != session && (epoch == "" || s.epoch == epoch) {
				found = append(found, m.doubt[other]...)
			}
			return false
		}
		delete(m.doubt, other)
		return true
	})
	return found
}

func (m *laneModel) complete(epoch string, sizes map[string]int) bool {
	for _, k := range laneKinds + "xn" {
		plain := k != 'k' && k != 'x' && k != 'n'
		if n := sizes[string(k)]; (plain || n > 0) && len(m.sets[epoch][string(k)]) != n {
			return false
		}
	}
	return true
}

func sumOfIDs(sizes map[string]int) (n int) {
	for _, k := range laneKinds {
		n += sizes[string(k)]
	}
	return n
}

// batch is batch of lane.lua.
func (m *laneModel) batch(b laneBatch) laneAnswer {
	s, known := m.sessions[b.session]
	losses := m.losses
	switch {
	case known && b.seq == s.seq:
		return laneAnswer{"ok", s.codes, s.gen, s.n}
	case b.seq < s.seq:
		return laneAnswer{"old", "", "", s.seq}
	case b.seq != s.seq+1:
		return laneAnswer{"gap", "", "", s.seq}
	}
	restoring, ping := b.mode == "p" || b.mode == "f", b.mode == "b"
	o, begun := m.open[b.epoch]
	o.sizes = maps.Clone(o.sizes)
	if o.sizes == nil {
		o.sizes = map[string]int{}
	}
	has := begun // a generation is known
	if !begun && (!ping || b.expect != "") {
		if over := m.over(b.epoch); over != nil {
			if !ping {
				return laneAnswer{status: "sealed"}
			}
			has, o.gen, o.sizes["d"] = true, b.expect, over.n
		}
	}
	if b.expect != "" && (!has || o.gen != b.expect) {
		return laneAnswer{"lost", "", o.gen, s.seq}
	}
	mode := b.mode
	if _, in := m.doubt[b.session]; mode == "r" && !(in && slices.Contains(m.active, b.session)) {
		mode = "5"
	}
	at := s.at
	if tick := b.tick || b.uncertain || !known || m.freeze != 0 || restoring; tick {
		if m.freeze != 0 && !restoring && !ping && m.frozen() {
			return laneAnswer{status: "frozen"}
		}
		if !known {
			m.identify()
		}
		if !known || math.Abs(m.now-at) > 5 {
			m.join(b.session, !known)
		}
		if at = m.now; ping && begun && !m.complete(b.epoch, o.sizes) {
			return laneAnswer{status: "missing"}
		}
	}
	n := sumOfIDs(o.sizes)
	if ping {
		m.sessions[b.session], m.doubt[b.session] = laneSession{b.seq, at, "", o.gen, n, b.epoch, losses}, []string{}
		m.uncertain[b.session] = b.uncertain
		return laneAnswer{"ok", "", o.gen, n}
	}
	if !has {
		m.identify()
		o.gen = b.session + ":" + strconv.Itoa(b.seq) + ":" + luaNumber(m.now)
	}
	freeze := m.freeze
	if mode == "p" {
		losses = m.noteLoss() - 1
		if freeze = m.now + 1.5; !b.whole {
			o.inexact = 1
		}
	}
	was := m.of(b.epoch).clone()
	answer, doubt, all := "", []string{}, []string{}
	total, more := 0, 0
	for k, ids := range b.ids {
		added, codes := m.add(b.epoch, laneKinds[k:k+1], ids, mode)
		kind := laneKinds[k : k+1]
		if o.sizes[kind] += added; len(ids) > 0 && len(m.sets[b.epoch][kind]) != o.sizes[kind] {
			m.sets[b.epoch] = was
			return laneAnswer{status: "missing"}
		}
		answer += codes
		total, more, all = total+len(ids), more+added, append(all, ids...)
	}
	codes, behind := "", ""
	if len(b.named) > 0 {
		tokens := o.sizes["x"]
		c, added, inexact := m.runNamed(b, mode, o.sizes)
		if !m.complete(b.epoch, o.sizes) {
			m.sets[b.epoch] = was
			return laneAnswer{status: "missing"}
		}
		if inexact {
			o.inexact, behind = 1, codeInexact
		}
		if restoring && added < len(c) {
			o.inexact = 1
		}
		if o.sizes["x"] != tokens {
			m.tokens[b.epoch] = o.sizes["x"]
		}
		n += added
		codes = c
	}
	var named []string
	if mode == "a" || mode == "l" {
		codes, named = m.judge(codes, func(i int) string { return b.named[i].id }, b.session, "")
	}
	n += more
	if mode == "a" || mode == "l" {
		answer, doubt = m.judge(answer, func(i int) string { return all[i] }, b.session, b.epoch)
		doubt = append(doubt, named...)
	}
	if restoring && more < total {
		o.inexact = 1
	}
	answer += codes + behind
	if m.freeze = freeze; more != 0 || restoring || len(b.named) > 0 || !begun {
		m.open[b.epoch] = o
	}
	m.sessions[b.session], m.doubt[b.session] = laneSession{b.seq, at, answer, o.gen, n, b.epoch, losses}, doubt
	m.uncertain[b.session] = b.uncertain
	return laneAnswer{"ok", answer, o.gen, n}
}

// add runs the ids of one kind.
func (m *laneModel) add(epoch, kind string, ids []string, mode string) (added int, codes string) {
	sets := m.of(epoch)
	for _, id := range ids {
		there := sets.has(kind, id)
		switch {
		case mode == "5":
			codes += "5"
		case mode == "r":
			codes += "1"
			if there {
				delete(sets[kind], id)
				added--
			}
		case there:
			codes += "0"
		case mode == "l":
			codes += "4"
		default:
			sets.put(kind, id, 0)
			codes += "1"
			added++
		}
	}
	return added, codes
}

// judge returns the codes with those in doubt, and the ids that the batch has added.
func (m *laneModel) judge(codes string, id func(int) string, session, epoch string) (judged string, added []string) {
	var others []string
	asked := false
	for i := range len(codes) {
		code := codes[i]
		switch code {
		case '1':
			added = append(added, id(i))
		case '4', '9':
		default:
			if !asked {
				others, asked = m.doubts(session, epoch), true
			}
			if slices.Contains(others, id(i)) {
				code = '2'
			}
		}
		judged += string(code)
	}
	return judged, added
}

// runNamed runs the ids with a token or a key.
func (m *laneModel) runNamed(b laneBatch, mode string, sizes map[string]int) (codes string, more int, inexact bool) {
	sets, was := m.of(b.epoch), sumOfIDs(sizes)
	tokens := slices.ContainsFunc(b.named, func(n laneNamed) bool { return n.token != "" })
	switch mode {
	case "5":
		return strings.Repeat("5", len(b.named)), 0, tokens
	case "r":
		for _, n := range b.named {
			codes += "1"
			if !sets.has(n.kind, n.id) {
				continue
			}
			delete(sets[n.kind], n.id)
			sizes[n.kind]--
			if n.key != "" && sets.has("n", n.key) { // else the counts are lost
				if sets.put("n", n.key, sets["n"][n.key]-1); sets["n"][n.key] == 0 {
					delete(sets["n"], n.key)
					sizes["n"]--
				}
			}
			if n.token != "" && sets.has("x", n.token) {
				delete(sets["x"], n.token)
				sizes["x"]--
			}
		}
		return codes, sumOfIDs(sizes) - was, false
	}
	restoring := mode == "p" || mode == "f"
	var others []laneSets
	if tokens && !restoring {
		inexact = b.tokensLost
		for _, epoch := range []string{b.before, b.after} {
			n, has := m.tokens[epoch]
			inexact = inexact || len(m.sets[epoch]["x"]) != n
			if !has {
				others = append(others, nil)
			} else {
				others = append(others, m.of(epoch))
			}
		}
	}
	room := b.maxKeys
	if restoring {
		room = math.MaxInt
	}
	return m.addNamed(b, mode, sizes, others, room), sumOfIDs(sizes) - was, inexact
}

func (m *laneModel) addNamed(b laneBatch, mode string, sizes map[string]int, others []laneSets, room int) string {
	sets, restoring := m.of(b.epoch), mode == "p" || mode == "f"
	codes := make([]byte, len(b.named))
	var full []string
	fresh := map[string]bool{}
	for i, n := range b.named {
		there := sets.has(n.kind, n.id)
		switch {
		case there && !restoring && n.token != "" && sets.has("x", n.token):
			codes[i] = '6'
		case len(others) > 0 && n.token != "" && others[0].has("x", n.token):
			codes[i] = '7'
		case len(others) > 0 && n.token != "" && others[1].has("x", n.token):
			codes[i] = '8'
		case there:
			codes[i] = '0'
		case mode == "l":
			codes[i] = '4'
		default:
			codes[i] = '1'
		}
		if codes[i] == '1' && n.key != "" && !sets.has("n", n.key) && !fresh[n.key] {
			if sizes["n"] >= room {
				full = append(full, n.key)
			} else {
				fresh[n.key] = true
				sizes["n"]++
			}
		}
	}
	for i, n := range b.named {
		if codes[i] == '1' && slices.Contains(full, n.key) {
			codes[i] = '9'
		}
		there := sets.has(n.kind, n.id)
		if codes[i] == '1' {
			if n.key != "" {
				sets.put("n", n.key, sets["n"][n.key]+1)
			}
			sets.put(n.kind, n.id, 0)
			sizes[n.kind]++
		}
		if n.token != "" && (codes[i] == '1' || restoring && there && !sets.has("x", n.token)) {
			sets.put("x", n.token, 0)
			sizes["x"]++
		}
	}
	return string(codes)
}

// hello is hello of lane.lua.
func (m *laneModel) hello(session string, expect, seq int) laneAnswer {
	last := m.sessions[session].seq
	if last == seq {
		return laneAnswer{status: "ok"}
	} else if last != expect {
		return laneAnswer{"gap", "", "", last}
	}
	m.identify()
	m.join(session, false)
	heard := m.losses
	if m.rules.helloFreezes {
		heard = m.noteLoss() - 1
		m.freeze = m.now + 1.5
	}
	m.sessions[session], m.doubt[session] = laneSession{seq: seq, at: m.now, losses: heard}, []string{}
	delete(m.uncertain, session)
	return laneAnswer{status: "ok"}
}

// reset is reset of lane.lua.
func (m *laneModel) reset(epoch, gen string) {
	if o, is := m.open[epoch]; is && (o.gen == gen || gen == "" && !m.complete(epoch, o.sizes)) {
		delete(m.sets, epoch)
		delete(m.open, epoch)
		m.noteLoss()
	}
}

// seal is seal of lane.lua. Before a session stands whether it has reported: see there.
func (m *laneModel) seal(epoch string, giveUp bool, sessions []string) (status string, ids sealedIDs) {
	answer := func(s laneSealed) (string, sealedIDs) {
		return "sealed", sealedIDs{unique: uint64(s.n), exact: s.exact == 1, whole: s.whole == 1, under: uint64(s.under), unanswered: s.unanswered == 1}
	}
	if over := m.over(epoch); over != nil {
		status, ids := answer(*over)
		for _, name := range sessions {
			ids.whole = ids.whole && (slices.Contains(over.sessions, name) || !m.rules.listed)
		}
		return status, ids
	}
	m.identify()
	start, _, _ := strings.Cut(epoch, ":")
	began, _ := strconv.ParseFloat(start, 64)
	began /= 1000
	recent := m.loss > began-10
	young := recent || m.born > began-10
	if m.freeze != 0 && m.frozen() {
		return "frozen", ids
	}
	s := laneSealed{epoch: epoch, exact: 1, whole: 1, until: m.now + 120, sessions: slices.Clone(sessions)}
	if o, is := m.open[epoch]; is {
		sizes := maps.Clone(o.sizes)
		s.exact = 1 - o.inexact
		if !m.complete(epoch, sizes) {
			if !giveUp {
				return "missing", ids
			}
			s.whole, s.exact = 0, 0
			for _, k := range laneKinds {
				sizes[string(k)] = len(m.sets[epoch][string(k)])
			}
		}
		s.n, s.under = sumOfIDs(sizes), sizes["k"]
	}
	absent := map[string]bool{}
	for _, name := range sessions {
		absent[name[1:]] = name[0] == '+'
		if of, is := m.sessions[name[1:]]; !is && m.rules.sessions && (name[0] != '?' || young) || is && recent && of.losses != m.losses && (name[0] != '?' || of.at > began-10) {
			s.whole = 0
		}
		if ids, in := m.doubt[name[1:]]; name[0] != '=' && m.sessions[name[1:]].epoch == epoch && (!in || len(ids) > 0 || m.uncertain[name[1:]]) && m.rules.unanswered {
			s.unanswered = 1
		}
	}
	for name, of := range m.sessions {
		if _, in := m.doubt[name]; in && recent && of.losses != m.losses && of.at > began-10 && !absent[name] && math.Abs(m.now-m.loss) < 3 {
			return "frozen", ids
		}
	}
	m.sealed = slices.DeleteFunc(m.sealed, func(old laneSealed) bool {
		if old.until <= m.now {
			delete(m.tokens, old.epoch)
		}
		return old.until <= m.now
	})
	m.sealed = append(m.sealed, s)
	delete(m.open, epoch)
	for _, k := range laneKinds {
		delete(m.of(epoch), string(k))
	}
	return answer(s)
}

// bye is bye of lane.lua.
func (m *laneModel) bye(session string) { delete(m.doubt, session) }

// dumpLane is what a lane has, a line each: dump of laneModel gives the same.
const dumpLane = `
local out = {}
local function line(...)
  local parts = {...}
  for i = 1, #parts do
    if type(parts[i]) == 'number' then parts[i] = string.format('%.14g', parts[i]) end
    if parts[i] == nil or parts[i] == false then parts[i] = '' end
  end
  out[#out + 1] = table.concat(parts, ' ')
end
local h = redis.call('HGETALL', KEYS[1])
for i = 1, #h, 2 do
  local f, v = h[i], h[i + 1]
  local c, name = string.sub(f, 1, 1), string.sub(f, 2)
  if f == 'freeze' or f == 'loss' or f == 'losses' or f == 'born' then line(f, tonumber(v))
  elseif f == 'id' then line(f, v)
  elseif f == 'replicas' then
  elseif c == 'S' then line('S', name, cmsgpack.unpack(v))
  elseif c == 'I' then
    local ids = {cmsgpack.unpack(v)}
    table.sort(ids)
    line('I', name, unpack(ids))
  elseif f == 'A' then line('A', unpack(cmsgpack.unpack(v)))
  elseif c == 'E' then line('E', name, cmsgpack.unpack(v))
  elseif c == 'L' then line('L', name, cmsgpack.unpack(v))
  elseif c == 'X' then line('X', name, tonumber(v))
  elseif f == 'Z' then
    for _, z in ipairs(cmsgpack.unpack(v)) do line('Z', unpack(z)) end
  else line('?', f, v) end
end
for _, k in ipairs(redis.call('KEYS', KEYS[1] .. ':*')) do
  local name = string.sub(k, #KEYS[1] + 2)
  if string.sub(k, -1) == 'n' then
    local n = redis.call('HGETALL', k)
    for i = 1, #n, 2 do line(name, n[i], tonumber(n[i + 1])) end
  else
    local s = redis.call('SMEMBERS', k)
    for i = 1, #s do line(name, s[i]) end
  end
end
table.sort(out)
return out
`

func (m *laneModel) dump() (out []string) {
	line := func(parts ...any) {
		for i := range parts {
			if f, is := parts[i].(float64); is {
				parts[i] = luaNumber(f)
			}
		}
		out = append(out, strings.TrimSuffix(fmt.Sprintln(parts...), "\n"))
	}
	if m.freeze != 0 {
		line("freeze", m.freeze)
	}
	if m.losses != 0 {
		line("loss", m.loss)
		line("losses", m.losses)
	}
	if m.known != "" {
		line("born", m.born)
		line("id", m.known)
	}
	for name, s := range m.sessions {
		line("S", name, s.seq, s.at, s.codes, s.gen, s.n, s.epoch, s.losses)
	}
	for name, ids := range m.doubt {
		ids = slices.Sorted(slices.Values(ids))
		line("I", strings.Join(append([]string{name}, ids...), " "))
	}
	if m.active != nil {
		line("A", strings.Join(m.active, " "))
	}
	for epoch, o := range m.open {
		h := o.sizes
		line("E", epoch, o.gen, o.inexact, h["d"], h["u"], h["t"], h["h"], h["k"], h["x"], h["n"])
	}
	for epoch, n := range m.tokens {
		line("X", epoch, n)
	}
	for _, z := range m.sealed {
		line("Z", z.epoch, z.n, z.exact, z.whole, z.until, z.under, 0, z.unanswered)
		line("L", strings.TrimSpace(z.epoch+" "+strings.Join(z.sessions, " ")))
	}
	for epoch, sets := range m.sets {
		for k, set := range sets {
			for id, n := range set {
				if k == "n" {
					line(epoch+":n", id, n)
				} else {
					line(epoch+":"+k, id)
				}
			}
		}
	}
	slices.Sort(out)
	return out
}
