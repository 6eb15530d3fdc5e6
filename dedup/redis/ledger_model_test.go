package redis

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// ledgerModel is a model of the ledger's scripts. TestTheScriptsDoWhatTheModelsDo holds the
// real ones to it, and model_test.go drives it.
type ledgerModel struct {
	now       int64 // ms, by the clock of the master
	rules     modelRules
	members   map[string]int64 // when each was heard last
	unsettled map[string]string
	windows   map[string]string
	opened    map[string]string
	leader    string
	epochs    map[string]int64 // not delivered: their end
	length    map[string]string
	of        map[string]map[string]string // the hash of each epoch
}

func newLedgerModel() *ledgerModel {
	return &ledgerModel{
		rules: allRules, members: map[string]int64{}, unsettled: map[string]string{}, windows: map[string]string{}, opened: map[string]string{},
		epochs: map[string]int64{}, length: map[string]string{}, of: map[string]map[string]string{},
	}
}

func (m *ledgerModel) clone() *ledgerModel {
	c := *m
	c.members, c.unsettled, c.windows, c.opened = maps.Clone(m.members), maps.Clone(m.unsettled), maps.Clone(m.windows), maps.Clone(m.opened)
	c.epochs, c.length, c.of = maps.Clone(m.epochs), maps.Clone(m.length), map[string]map[string]string{}
	for name, h := range m.of {
		c.of[name] = maps.Clone(h)
	}
	return &c
}

// epoch returns the hash of an epoch, to be changed.
func (m *ledgerModel) epoch(name string) map[string]string {
	if m.of[name] == nil {
		m.of[name] = map[string]string{}
	}
	return m.of[name]
}

// alive are the members that were heard within the time, by when they were.
func (m *ledgerModel) alive(ttl int64) []string {
	names := slices.SortedFunc(maps.Keys(m.members), func(a, b string) int {
		return cmp.Or(cmp.Compare(m.members[a], m.members[b]), cmp.Compare(a, b))
	})
	return slices.DeleteFunc(names, func(n string) bool { return m.members[n] < m.now-ttl })
}

// answered is luaAnswers.
func answered(h map[string]string, member, n string) {
	rows := answers{}
	if old, some := h["m:"+member]; some {
		rows[member] = old
	}
	rows.note(member, n)
	h["m:"+member] = rows[member]
}

// ledgerBeat is what a heartbeat sends, ledgerEpochBeat what it has of an epoch.
type ledgerBeat struct {
	me                        string
	claims                    bool
	unsettled, window, opened string
	unnamed                   int
	at                        int64 // of the last one; -1: there was none
	yields                    bool  // it leaves the lead to others
	listed                    []string
	alone                     int64 // -1: it may answer alone itself
	epochs                    []ledgerEpochBeat
}

type ledgerEpochBeat struct {
	name           string
	ends           int64
	decided        *ledgerDecision
	reported       *ledgerReport
	had, uncertain bool
	asks           bool
	known          answers
}

// ledgerReport is what a member has reported of an epoch, beside its answers.
type ledgerReport struct {
	complete, exact bool
	under           string
}

// ledgerBeatAnswer is the answer, with what is known of each epoch.
type ledgerBeatAnswer struct {
	leads             bool
	others, silent    []string
	insider, outsider string
	states            []string
	known             []answers
	decided           []string
	unnamed           []string
	behind            bool
	alone             int64
}

type ledgerDecision struct{ unique, complete, exact, sealed, under string }

func (d *ledgerDecision) String() string {
	return strings.Join([]string{d.unique, d.complete, d.exact, d.sealed, d.under}, " ")
}

const (
	modelTTL    = 3000
	modelSkew   = 2000
	modelLonger = 5000
	modelLock   = 1000
	modelForget = 600_000
	modelClaim  = 2000
)

func millis(s string) (n int64, some bool) {
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil
}

// beat is beatScript.
func (m *ledgerModel) beat(b ledgerBeat) (a ledgerBeatAnswer) {
	if a.behind = m.lost(b.me, b.at); a.behind {
		for _, name := range b.listed {
			if _, there := m.members[name]; !there {
				m.members[name] = m.now - modelTTL - 1
			}
		}
	}
	m.members[b.me], m.windows[b.me] = m.now, b.window
	if b.unsettled == "" {
		delete(m.unsettled, b.me)
	} else {
		m.unsettled[b.me] = b.unsettled
	}
	if n, some := millis(b.opened); some {
		if was, had := millis(m.opened[b.me]); !had || n > was {
			m.opened[b.me] = b.opened
		}
	}
	for name, at := range m.members {
		if at <= m.now-modelForget {
			delete(m.members, name)
			delete(m.unsettled, name)
			delete(m.windows, name)
			delete(m.opened, name)
		}
	}
	if a.alone = b.alone; b.alone < 0 {
		a.alone = m.now
	}
	if last, _ := millis(m.length["alone"]); a.alone > last {
		m.length["alone"] = strconv.FormatInt(a.alone, 10)
	} else {
		a.alone = last
	}
	agreed := m.length["length"]
	for _, name := range m.alive(modelTTL) {
		if name == b.me {
			continue
		}
		a.others = append(a.others, name)
		if w, some := m.windows[name]; some && w != b.window && (w == agreed || agreed == b.window) {
			if w == agreed {
				a.insider = w + " " + name
			} else {
				a.outsider = w + " " + name
			}
		}
	}
	inside := agreed == b.window || a.insider == "" && b.claims
	if inside {
		m.length["length"] = b.window
	} else if a.insider == "" {
		a.insider = agreed + " "
	}
	for _, e := range b.epochs {
		state, rows, d := m.beatEpoch(b.me, e, inside)
		a.states, a.known, a.decided = append(a.states, state), append(a.known, rows), append(a.decided, d)
	}
	if m.leader == b.me && b.yields {
		m.leader = ""
	} else if m.leader == "" && inside && !b.yields {
		m.leader = b.me
	}
	unnamed := slices.SortedFunc(maps.Keys(m.epochs), func(x, y string) int {
		return cmp.Or(cmp.Compare(m.epochs[x], m.epochs[y]), cmp.Compare(x, y))
	})
	a.unnamed = slices.DeleteFunc(unnamed[max(0, len(unnamed)-b.unnamed):], func(name string) bool {
		return slices.ContainsFunc(b.epochs, func(e ledgerEpochBeat) bool { return e.name == name })
	})
	a.silent = m.alive(modelForget)
	a.silent = a.silent[:len(a.silent)-len(m.alive(modelTTL))]
	a.leads = m.leader == b.me
	return a
}

func (m *ledgerModel) beatEpoch(me string, e ledgerEpochBeat, inside bool) (string, answers, string) {
	rows := answers{}
	if m.of[e.name]["delivered"] != "" {
		return "delivered", rows, ""
	}
	_, open := m.epochs[e.name]
	if !e.had && e.decided == nil && (e.asks && !open && len(m.of[e.name]) == 0 || !e.asks && !m.takes(e.name, inside)) {
		return "refused", rows, ""
	}
	m.epochs[e.name] = e.ends
	h := m.epoch(e.name)
	if h["unique"] != "" {
		if e.decided == nil {
			return "decided", rows, decisionOf(h).String()
		} else if h["unique"] != e.decided.unique {
			return "contradicted", rows, ""
		}
		return "open", rows, ""
	}
	for member, n := range e.known {
		answered(h, member, n)
	}
	if delete(h, "d:"+me); e.uncertain {
		h["d:"+me] = "1"
	}
	if d := e.decided; d != nil {
		m.write(h, d)
		return "open", rows, ""
	}
	if r := e.reported; r != nil {
		if r.complete {
			h["complete"] = "1"
		}
		if !r.exact {
			h["inexact"] = "1"
		}
		if r.under != "0" {
			h["k:"+me] = r.under
		}
	}
	return "open", rowsOf(h), ""
}

func rowsOf(h map[string]string) answers {
	rows := answers{}
	for f, n := range h {
		if member, is := strings.CutPrefix(f, "m:"); is {
			rows[member] = n
		}
	}
	return rows
}

func (m *ledgerModel) write(h map[string]string, d *ledgerDecision) {
	h["unique"], h["complete"], h["exact"], h["sealed"], h["under"] = d.unique, d.complete, d.exact, d.sealed, d.under
}

func (m *ledgerModel) takes(name string, inside bool) bool {
	if _, open := m.epochs[name]; open || len(m.of[name]) > 0 {
		return true
	} else if !inside {
		return false
	}
	s, _ := parseEpochName(name)
	start, span := s.Start.UnixMilli(), ms(s.Window)
	last, some := millis(m.length["last"])
	switch {
	case m.length["span"] == span:
		if from, set := millis(m.length["from"]); set && start < from {
			return false
		}
	case m.length["span"] == "":
		m.length["span"] = span
	case start > last:
		m.length["span"], m.length["from"] = span, strconv.FormatInt(start, 10)
	default:
		return false
	}
	if !some || start > last && start < m.now+3_600_000 {
		m.length["last"] = strconv.FormatInt(start, 10)
	}
	return true
}

// seal is sealScript: what was decided, or for how long to wait, or the members that have
// answered ids, for the caller to seal.
func (m *ledgerModel) seal(name, me string, at int64, known answers) (d *ledgerDecision, wait int64, members []string) {
	s, _ := parseEpochName(name)
	start, ends := s.Start.UnixMilli(), s.End().UnixMilli()
	h := m.of[name]
	if h["unique"] != "" {
		return decisionOf(h), 0, nil
	}
	if m.now < ends-modelSkew {
		return nil, ends - modelSkew - m.now, nil
	}
	if m.lost(me, at) {
		return nil, modelSkew, nil
	}
	for member, n := range known {
		h = m.epoch(name)
		answered(h, member, n)
	}
	inexact := false
	for _, member := range m.alive(modelTTL) {
		w, agreed := m.windows[member], m.length["length"]
		n := h["m:"+member]
		if (agreed == "" || w == "" || w == agreed) && (n == "" || strings.HasSuffix(n, "+")) {
			wait = max(wait, ends+modelSkew-m.now)
		}
		var oldest, newest int64
		if got, _ := fmt.Sscan(m.unsettled[member], &oldest, &newest); got == 2 && oldest <= start && start <= newest {
			inexact = true
			wait = max(wait, ends+modelSkew+modelLonger-m.now)
		}
	}
	if wait > 0 {
		return nil, wait, nil
	}
	if locked, _ := millis(h["locked"]); locked > m.now {
		return nil, locked - m.now, nil
	}
	h = m.epoch(name)
	h["locked"] = strconv.FormatInt(m.now+modelLock, 10)
	if inexact {
		h["inexact"] = "1"
	}
	members = []string{}
	for _, member := range m.unlisted(rowsOf(h), start) {
		if m.rules.late {
			members = append(members, "?"+member)
		}
	}
	for member, n := range rowsOf(h) {
		mark := "="
		if n == "0" {
			mark = "0"
		} else if strings.HasSuffix(n, "+") {
			mark = "+"
		}
		members = append(members, mark+member)
	}
	slices.Sort(members)
	return nil, 0, members
}

func decisionOf(h map[string]string) *ledgerDecision {
	return &ledgerDecision{h["unique"], h["complete"], h["exact"], h["sealed"], cmp.Or(h["under"], "0")}
}

// lost is luaLost.
func (m *ledgerModel) lost(me string, at int64) bool {
	was, is := m.members[me]
	return me != "" && (!is && at > -1 || is && was < at)
}

// decide is decideScript; nil: the ledger has lost data.
func (m *ledgerModel) decide(name string, ids sealedIDs, fit, open bool, me string, at int64, members []string) *ledgerDecision {
	s, _ := parseEpochName(name)
	start, h := s.Start.UnixMilli(), m.epoch(name)
	if h["unique"] != "" {
		return decisionOf(h)
	}
	if m.lost(me, at) {
		return nil
	}
	last, _ := millis(m.length["alone"])
	open = open || last > m.now-modelForget
	for _, listed := range members {
		mark, n := listed[:1], h["m:"+listed[1:]]
		if m.rules.listed && (mark != "?" && n == "" || (mark == "=" || mark == "0") && strings.HasSuffix(n, "+")) {
			return nil
		}
	}
	for member := range rowsOf(h) {
		if m.rules.listed && !slices.ContainsFunc(members, func(listed string) bool { return listed[1:] == member }) {
			return nil
		}
	}
	var sum, least, keyed uint64
	rows := rowsOf(h)
	absent, uncertain := 0, false
	for _, n := range rows {
		if strings.HasSuffix(n, "+") {
			absent++
			least += atLeast(n)
		} else {
			sum += atLeast(n)
			uncertain = uncertain || strings.HasSuffix(n, "?")
		}
	}
	for f, n := range h {
		if strings.HasPrefix(f, "k:") {
			keyed += atLeast(n)
		}
		uncertain = uncertain || strings.HasPrefix(f, "d:")
	}
	maps.DeleteFunc(h, func(f, _ string) bool { return f[1:2] == ":" })
	late := len(m.unlisted(rows, start)) > 0
	unique, exact := sum, ids.exact && ids.whole && fit && h["inexact"] == ""
	switch {
	case absent > 0:
		unique = max(ids.unique, sum+least)
		exact = exact && ids.unique >= sum+least && !open && !(uncertain && m.rules.doubts) && !(ids.unanswered && ids.unique > sum+least)
	case len(rows) == 0 && ids.unique > 0, (ids.unique > sum || open) && late && m.rules.late:
		unique, exact = max(ids.unique, sum), false
	case !m.rules.account:
		exact = ids.exact
	default:
		exact = exact && ids.unique >= sum
	}
	if absent == 0 && ids.unique > unique && keyed != ids.under {
		unique, exact = max(unique, ids.under), false
	}
	d := &ledgerDecision{
		strconv.FormatUint(unique, 10), cmp.Or(h["complete"], "0"), flag(exact), strconv.FormatInt(m.now, 10), strconv.FormatUint(ids.under, 10),
	}
	m.write(h, d)
	delete(h, "locked")
	delete(h, "inexact")
	m.epochs[name] = s.End().UnixMilli()
	return d
}

// unlisted are the members that may have answered ids of an epoch without the ledger.
func (m *ledgerModel) unlisted(rows answers, start int64) (names []string) {
	for member := range m.members {
		opened, some := millis(m.opened[member])
		if _, in := rows[member]; !in && (!some || opened <= start) {
			names = append(names, member)
		}
	}
	return names
}

// unpublished is unpublishedScript.
func (m *ledgerModel) unpublished(open bool) (names []string) {
	for name, ends := range m.epochs {
		if open || ends <= m.now {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// claim is claimScript.
func (m *ledgerModel) claim(me, name string, at int64, before []string) string {
	h := m.of[name]
	if h["written"] != "" || h["delivered"] != "" {
		return "written"
	} else if m.lost(me, at) {
		return "lost"
	}
	answer := "mine"
	if since, claimant, claimed := strings.Cut(h["claimed"], " "); claimed {
		if then, _ := millis(since); slices.Contains(before, claimant) {
			answer = "again"
		} else if claimant != me && m.now-then < modelClaim {
			return "other"
		} else if claimant != me {
			answer = "late"
		}
	}
	if answer != "again" {
		if m.leader != "" && m.leader != me {
			return "other"
		}
		m.leader = me
	}
	m.epoch(name)["claimed"] = strconv.FormatInt(m.now, 10) + " " + me
	return answer
}

// onlyDelivered reports whether the decision on an epoch is lost, and not that its record is
// delivered: seal and decide then answer that.
func (m *ledgerModel) onlyDelivered(name string) bool {
	return m.of[name]["delivered"] != "" && m.of[name]["unique"] == ""
}

// delivered is deliveredScript.
func (m *ledgerModel) delivered(name string) {
	m.epoch(name)["delivered"] = "1"
	delete(m.epochs, name)
}

// leave is leaveScript.
func (m *ledgerModel) leave(me, unsettled string) (n int, ago int64) {
	delete(m.members, me)
	delete(m.windows, me)
	delete(m.opened, me)
	if unsettled == "" {
		delete(m.unsettled, me)
	}
	last := int64(0)
	for _, name := range m.alive(modelTTL) {
		n++
		last = max(last, m.members[name])
	}
	if n > 0 && m.leader == me {
		m.leader = ""
	}
	return n, m.now - last
}

// dumpLedger is what the ledger has, a line for each value: dump of ledgerModel gives the same,
// but for the reasons, which it does not have.
const dumpLedger = `
local out = {}
for _, k in ipairs(redis.call('KEYS', KEYS[1] .. '*')) do
  local name, kind = string.sub(k, #KEYS[1] + 1), redis.call('TYPE', k).ok
  if kind == 'string' then
    out[#out + 1] = name .. ' ' .. redis.call('GET', k)
  elseif kind == 'hash' then
    local h = redis.call('HGETALL', k)
    for i = 1, #h, 2 do
      if h[i] ~= 'why' then out[#out + 1] = name .. ' ' .. h[i] .. ' ' .. h[i + 1] end
    end
  else
    local z = redis.call('ZRANGE', k, 0, -1, 'WITHSCORES')
    for i = 1, #z, 2 do out[#out + 1] = name .. ' ' .. z[i] .. ' ' .. z[i + 1] end
  end
end
table.sort(out)
return out
`

func (m *ledgerModel) dump() (out []string) {
	line := func(parts ...any) { out = append(out, strings.TrimSuffix(fmt.Sprintln(parts...), "\n")) }
	for name, h := range map[string]map[string]string{"unsettled": m.unsettled, "windows": m.windows, "opened": m.opened, "length": m.length} {
		for f, v := range h {
			line(name, f, v)
		}
	}
	for name, z := range map[string]map[string]int64{"members": m.members, "epochs": m.epochs} {
		for f, v := range z {
			line(name, f, v)
		}
	}
	if m.leader != "" {
		line("leader", m.leader)
	}
	for name, h := range m.of {
		for f, v := range h {
			line("epoch:"+name, f, v)
		}
	}
	slices.Sort(out)
	return out
}
