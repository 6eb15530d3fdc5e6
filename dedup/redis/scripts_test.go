package redis

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/redis/rueidis"

	"verve/counter"
)

// clocked is a script whose clock is a key.
func clocked(text string) *rueidis.Lua {
	for _, call := range []string{"redis.call('TIME')", "call('TIME')"} {
		text = strings.ReplaceAll(text, call, strings.Replace(call, "'TIME'", "'HMGET', 'clock', 's', 'us'", 1))
	}
	return rueidis.NewLuaScript(text)
}

// textOf is the text of a script.
func textOf(s *rueidis.Lua) string { return reflect.ValueOf(s).Elem().FieldByName("script").String() }

var clockedScripts = map[string]*rueidis.Lua{
	"lane": clocked(laneLua), "beat": clocked(textOf(beatScript)),
	"seal": clocked(textOf(sealScript)), "decide": clocked(textOf(decideScript)), "unpublished": clocked(textOf(unpublishedScript)),
	"claim": clocked(textOf(claimScript)), "mark": clocked(textOf(publishedScript)),
	"leave": clocked(textOf(leaveScript)), "dump lane": rueidis.NewLuaScript(dumpLane), "dump ledger": rueidis.NewLuaScript(dumpLedger),
}

// twins are a real Redis and the models of it. Each operation is done by both.
type twins struct {
	t      *testing.T
	server *redisServer
	client rueidis.Client
	rnd    *rand.Rand
	trace  []string
	short  int // batches that had the short answer

	lane   *laneModel
	ledger *ledgerModel
	keys   ledgerKeys

	// An older copy of both.
	oldLane   *laneModel
	oldLedger *ledgerModel
	oldKeys   map[string]string
}

const twinLane = "verve:{t}:g:lane"

func (w *twins) do(args ...string) rueidis.RedisMessage {
	w.t.Helper()
	m, err := w.client.Do(w.t.Context(), w.client.B().Arbitrary(args...).Build()).ToMessage()
	if err != nil && !rueidis.IsRedisNil(err) {
		w.t.Fatalf("%v: %v\n%s", args, err, strings.Join(w.trace, "\n"))
	}
	return m
}

// run runs a script and returns its answer as text.
func (w *twins) run(script string, keys []string, args ...string) string {
	w.t.Helper()
	m, err := clockedScripts[script].Exec(w.t.Context(), w.client, keys, args).ToMessage()
	if err != nil {
		w.t.Fatalf("%s %q: %v\n%s", script, args, err, strings.Join(w.trace, "\n"))
	}
	return textOfMessage(m)
}

func textOfMessage(m rueidis.RedisMessage) string {
	if m.IsArray() {
		list, _ := m.ToArray()
		parts := make([]string, len(list))
		for i := range list {
			parts[i] = textOfMessage(list[i])
		}
		return "[" + strings.Join(parts, " ") + "]"
	}
	if m.IsInt64() {
		n, _ := m.ToInt64()
		return strconv.FormatInt(n, 10)
	}
	s, _ := m.ToString()
	return s
}

// same fails the test unless both have given the same answer.
func (w *twins) same(what, redis, model string) {
	w.t.Helper()
	w.trace = append(w.trace, what+" -> "+model)
	if redis != model {
		w.t.Fatalf("%s: Redis answers %s, the model %s\n%s", what, redis, model, strings.Join(w.trace, "\n"))
	}
}

// reset begins a sequence.
func (w *twins) reset() {
	w.trace = nil
	w.do("FLUSHALL")
	id := w.identity()
	w.lane, w.ledger = newLaneModel(), newLedgerModel()
	w.lane.identity, w.oldLane = id, nil
	w.pass(1000 - 0.25*float64(w.rnd.IntN(8)))
}

func (w *twins) identity() string {
	s, _ := w.client.Do(w.t.Context(), w.client.B().Info().Section("replication").Build()).ToString()
	_, id, _ := strings.Cut(s, "master_replid:")
	id, _, _ = strings.Cut(id, "\r")
	return id
}

// pass lets time pass.
func (w *twins) pass(seconds float64) {
	w.lane.now += seconds
	w.ledger.now = int64(w.lane.now * 1000)
	w.do("HSET", "clock", "s", strconv.FormatInt(w.ledger.now/1000, 10), "us", strconv.FormatInt(w.ledger.now%1000*1000, 10))
	w.trace = append(w.trace, "it is "+luaNumber(w.lane.now))
}

// copyAll takes a copy of all that there is, as a replica has it.
func (w *twins) copyAll() {
	w.oldKeys = map[string]string{}
	keys, _ := w.client.Do(w.t.Context(), w.client.B().Keys().Pattern("verve:*").Build()).AsStrSlice()
	for _, k := range keys {
		w.oldKeys[k], _ = w.client.Do(w.t.Context(), w.client.B().Dump().Key(k).Build()).ToString()
	}
	w.oldLane, w.oldLedger = w.lane.clone(), w.ledger.clone()
	w.trace = append(w.trace, "a replica has all")
}

// failover goes on with the copy, as another master does.
func (w *twins) failover() {
	w.lose()
	for k, v := range w.oldKeys {
		w.do("RESTORE", k, "0", v)
	}
	w.do("DEBUG", "CHANGE-REPL-ID")
	now := w.lane.now
	w.lane, w.ledger = w.oldLane.clone(), w.oldLedger.clone()
	w.lane.identity, w.lane.now = w.identity(), now
	w.pass(0)
	w.trace = append(w.trace, "failover to what the replica has")
}

// lose is FLUSHALL.
func (w *twins) lose() {
	w.do("FLUSHALL")
	was := w.lane
	w.lane, w.ledger = newLaneModel(), newLedgerModel()
	w.lane.identity, w.lane.now = was.identity, was.now
	w.pass(0)
	w.trace = append(w.trace, "FLUSHALL")
}

func pick[T any](rnd *rand.Rand, from ...T) T { return from[rnd.IntN(len(from))] }

func packed(ids ...string) string {
	var b strings.Builder
	for _, id := range ids {
		b.WriteByte(0xa0 | byte(len(id)))
		b.WriteString(id)
	}
	return b.String()
}

var twinEpochs = []string{"990000:10000", "1000000:10000", "1010000:10000"}

// twinSessions are two of an instance, and one of another.
var twinSessions = []string{"0123456-a", "0123456-b", "1234567-c"}

// batch sends a batch as a session may, and one that it may not.
func (w *twins) batch() {
	rnd, session := w.rnd, pick(w.rnd, twinSessions...)
	i := pick(rnd, 1, 1, 1, 1, 1, 2)
	b := laneBatch{
		session: session, seq: w.lane.sessions[session].seq + pick(rnd, 1, 1, 1, 1, 1, 1, 1, 1, 0, 2, -1),
		mode: pick(rnd, "a", "a", "a", "a", "l", "r", "r", "p", "f", "b"), epoch: twinEpochs[i], before: twinEpochs[i-1],
		whole: rnd.IntN(5) > 0, tick: rnd.IntN(2) == 0, uncertain: rnd.IntN(6) == 0, maxKeys: 2, tokensLost: rnd.IntN(10) == 0,
	}
	if b.after = "1020000:10000"; i == 1 {
		b.after = twinEpochs[2]
	}
	b.expect = pick(rnd, "", w.lane.open[b.epoch].gen, w.lane.open[b.epoch].gen, w.lane.open[b.epoch].gen, "other")
	if b.expect == "other" && rnd.IntN(3) > 0 {
		b.expect = ""
	}
	if usual := rnd.IntN(2) == 0; usual {
		b.seq, b.mode, b.expect, b.tick, b.uncertain = w.lane.sessions[session].seq+1, "a", w.lane.open[b.epoch].gen, false, false
		k, first := pick(rnd, 0, 0, 2), rnd.IntN(30)
		for n := range 1 + rnd.IntN(4) {
			b.ids[k] = append(b.ids[k], strconv.Itoa(50+first+n))
		}
	} else if b.mode != "b" {
		w.fill(&b)
	}
	var all lists
	var named []string
	for k := range b.ids {
		all[k] = packed(b.ids[k]...)
	}
	for _, n := range b.named {
		named = append(named, n.kind, n.id, n.token, n.key)
	}
	all[namedIDs] = packed(named...)
	tick := flag(b.tick)
	if b.uncertain {
		tick = "2"
	}
	args := []string{"batch", b.session, strconv.Itoa(b.seq), b.mode, b.epoch, b.expect, "1000"}
	k := all.only()
	if few := k >= 0 && tick == "0" && b.mode == "a"; few {
		args = append(args, strconv.Itoa(k+1), all[k])
	} else {
		args = append(args, "1.5", flag(b.whole), tick, all[0], all[1], all[2], all[3])
	}
	if len(named) > 0 {
		args = append(args, all[namedIDs], b.before, b.after, strconv.Itoa(b.maxKeys), flag(b.tokensLost))
	}
	a, out := w.lane.batch(b), w.run("lane", []string{twinLane}, args...)
	if n, err := strconv.Atoi(out); err == nil { // the short answer
		out = laneAnswer{"ok", strings.Repeat("1", len(b.ids[max(0, k)])), b.expect, n}.String()
		w.short++
	}
	w.same(fmt.Sprintf("%+v", b), out, a.String())
}

// fill gives a batch some ids.
func (w *twins) fill(b *laneBatch) {
	pool := []laneNamed{
		{"d", "11", "", ""}, {"d", "22", "", ""}, {"d", "33", "", ""}, {"t", "ta", "", ""}, {"t", "tb", "", ""},
		{"k", "k1", "", "x"}, {"k", "k2", "", "x"}, {"k", "k3", "", "y"}, {"k", "k4", "", "z"},
	}
	w.rnd.Shuffle(len(pool), func(i, j int) { pool[i], pool[j] = pool[j], pool[i] })
	for _, n := range pool[:1+w.rnd.IntN(4)] {
		if w.rnd.IntN(3) == 0 {
			n.token = n.id + pick(w.rnd, "~1", "~1", "~2")
		}
		// An id is taken back as it was added, so its token is there only with the id.
		sets := w.lane.of(b.epoch)
		has := slices.DeleteFunc([]string{n.id + "~1", n.id + "~2"}, func(token string) bool { return !sets.has("x", token) })
		if len(has) > 0 && (b.mode == "r" || !sets.has(n.kind, n.id)) {
			if n.token = has[0]; b.mode != "r" || len(has) > 1 {
				continue
			}
		}
		if n.token == "" && n.key == "" {
			k := strings.Index(laneKinds, n.kind)
			b.ids[k] = append(b.ids[k], n.id)
		} else {
			b.named = append(b.named, n)
		}
	}
}

// sealLane seals an epoch in the lane.
func (w *twins) sealLane() {
	epoch, giveUp := twinEpochs[1+w.rnd.IntN(2)], w.rnd.IntN(3) == 0
	var sessions []string
	for _, s := range twinSessions {
		if w.rnd.IntN(2) == 0 {
			sessions = append(sessions, pick(w.rnd, "+", "=", "?")+s)
		}
	}
	status, ids := w.lane.seal(epoch, giveUp, sessions)
	model := "[" + status + "]"
	if status == "sealed" {
		model = fmt.Sprintf("[sealed %d %s %s %d 0 %s]", ids.unique, flag(ids.exact), flag(ids.whole), ids.under, flag(ids.unanswered))
	}
	w.same(fmt.Sprint("seal ", epoch, giveUp, sessions), w.run("lane", []string{twinLane}, append([]string{"seal", epoch, "120", "3", flag(giveUp), "1000", "100"}, sessions...)...), model)
}

// other is a rare operation on a lane, or a loss of one of its keys.
func (w *twins) other() {
	session, epoch := pick(w.rnd, twinSessions...), twinEpochs[1+w.rnd.IntN(2)]
	switch w.rnd.IntN(8) {
	case 0, 1, 2:
		last := w.lane.sessions[session].seq
		expect := last + pick(w.rnd, 0, 0, 0, 1)
		a := w.lane.hello(session, expect, last+100)
		model := "[ok]"
		if a.status != "ok" {
			model = a.String()
		}
		w.same(fmt.Sprint("hello ", session, expect), w.run("lane", []string{twinLane}, "hello", session, strconv.Itoa(expect), strconv.Itoa(last+100), "1000", "1.5"), model)
	case 3:
		w.lane.bye(session)
		w.same("bye "+session, w.run("lane", []string{twinLane}, "bye", session), "[ok]")
	case 4:
		gen := pick(w.rnd, w.lane.open[epoch].gen, "other", "")
		w.lane.reset(epoch, gen)
		w.same("reset "+epoch+gen, w.run("lane", []string{twinLane}, "reset", epoch, gen), "[ok]")
	case 5:
		k := string(laneKinds[w.rnd.IntN(len(laneKinds))])
		delete(w.lane.of(epoch), k)
		w.do("DEL", twinLane+":"+epoch+":"+k)
		w.trace = append(w.trace, epoch+":"+k+" is evicted")
	default:
		k := pick(w.rnd, "x", "n", "n")
		delete(w.lane.of(epoch), k)
		w.do("DEL", twinLane+":"+epoch+":"+k)
		w.trace = append(w.trace, epoch+":"+k+" is evicted")
	}
}

var twinSpans = []string{"990000:10000", "1000000:10000", "1010000:10000", "1000000:20000"}

func (w *twins) ofEpoch(name string) string { return w.keys.prefix + "epoch:" + name }

// beat sends a heartbeat.
func (w *twins) beat() {
	rnd := w.rnd
	b := ledgerBeat{
		me: pick(rnd, "a", "b", "c"), claims: rnd.IntN(4) > 0, window: pick(rnd, "10000", "10000", "10000", "20000"),
		unsettled: pick(rnd, "", "", "", "1000000 1000000", "990000 1010000"), opened: pick(rnd, "", "1000000", "1000000", "1010000"),
		unnamed: pick(rnd, 1, 2, 64), at: pick(rnd, -1, w.ledger.now-pick[int64](rnd, 0, 250, 1000, 4000)), yields: rnd.IntN(4) == 0,
	}
	k, keys := w.keys, []string(nil)
	args := []string{b.me, "3000", "604800000", "600000", "3000", flag(b.claims), b.unsettled, b.window, b.opened, strconv.Itoa(b.unnamed), strconv.FormatInt(b.at, 10), flag(!b.yields)}
	for _, m := range []string{"a", "b", "c"} {
		if m != b.me && rnd.IntN(2) == 0 {
			b.listed = append(b.listed, m)
		}
	}
	b.alone = pick(rnd, 0, 0, 0, 0, -1, w.ledger.now-500)
	alone := strconv.FormatInt(b.alone, 10)
	if b.alone < 0 {
		alone = ""
	}
	args = append(append(args, alone, strconv.Itoa(len(b.listed))), b.listed...)
	var sent []counter.Span
	for _, name := range slices.Compact(slices.Sorted(slices.Values([]string{pick(rnd, twinSpans...), pick(rnd, twinSpans...)}))) {
		s, _ := parseEpochName(name)
		e := ledgerEpochBeat{name: name, ends: s.End().UnixMilli(), had: rnd.IntN(2) == 0, asks: rnd.IntN(3) == 0, uncertain: rnd.IntN(5) == 0, known: answers{}}
		for _, m := range []string{"a", "b", "c"} {
			if rnd.IntN(2) == 0 {
				e.known[m] = strconv.Itoa(rnd.IntN(4)) + pick(rnd, "", "?", "+", "+")
			}
		}
		decided := []string{"", "", "", "", ""}
		if rnd.IntN(8) == 0 {
			e.decided, e.known = &ledgerDecision{strconv.Itoa(rnd.IntN(5)), "1", "1", "5", "0"}, answers{}
			decided = strings.Fields(e.decided.String())
		} else if rnd.IntN(3) == 0 {
			e.reported = &ledgerReport{rnd.IntN(2) == 0, rnd.IntN(5) > 0, strconv.Itoa(rnd.IntN(2))}
			decided = []string{"", flag(e.reported.complete), flag(e.reported.exact), "", e.reported.under}
		}
		b.epochs, sent = append(b.epochs, e), append(sent, s)
		keys = append(keys, w.ofEpoch(name))
		args = append(append(args, name, strconv.FormatInt(e.ends, 10)), decided...)
		had := flag(e.had)
		if e.asks && !e.had {
			had = "?"
		}
		args = append(args, had, flag(e.uncertain), strconv.Itoa(len(e.known)))
		for m, n := range e.known {
			args = append(args, m, n)
		}
	}
	out, err := clockedScripts["beat"].Exec(w.t.Context(), w.client, append([]string{k.members, k.unsettled, k.windows, k.leader, k.epochs, k.length, k.opened}, keys...), args).ToArray()
	if err != nil {
		w.t.Fatal(err)
	}
	want := w.ledger.beat(b)
	got, err := parseBeat(out, sent)
	if err != nil {
		w.t.Fatal(err)
	}
	a := ledgerBeatAnswer{leads: got.leads, others: got.others, silent: got.silent, insider: got.insider, outsider: got.outsider, behind: got.behind, alone: got.alone}
	for _, e := range got.epochs {
		decided := ""
		if d := e.decision; d != nil {
			decided = strings.TrimSpace(fmt.Sprintln(d.Unique, flag(d.Complete), flag(d.Exact), d.SealedAt.UnixMilli(), d.under))
		}
		a.states, a.known, a.decided = append(a.states, e.state), append(a.known, e.answers), append(a.decided, decided)
	}
	for _, s := range got.unnamed {
		a.unnamed = append(a.unnamed, epochName(s))
	}
	w.same(fmt.Sprintf("%+v", b), fmt.Sprintf("%d %+v", got.now, a), fmt.Sprintf("%d %+v", w.ledger.now, want))
}

// reasoned returns a decision without its reason, which the model does not have: there must
// be one unless it is exact. A beat writes exact decisions only.
func (w *twins) reasoned(decision string) string {
	parts := strings.SplitN(strings.Trim(decision, "[]"), " ", 7)
	if len(parts) != 7 || (parts[6] == "") != (parts[3] == "1") {
		w.t.Errorf("the reason in %q", parts)
	}
	return "[" + strings.Join(parts[:6], " ") + "]"
}

// ledgerStep does another operation of the ledger.
func (w *twins) ledgerStep() {
	rnd, k := w.rnd, w.keys
	me, name := pick(rnd, "a", "b", "c"), pick(rnd, twinSpans...)
	s, _ := parseEpochName(name)
	ends, epoch := s.End().UnixMilli(), w.ofEpoch(name)
	switch rnd.IntN(11) {
	case 0, 1:
		sealer, at := pick(rnd, "", "a", "b"), w.ledger.now-pick[int64](rnd, 0, 250, 1000, 4000)
		known, rows := answers{}, []string(nil)
		if m := pick(rnd, "", "", "a", "c"); m != "" {
			known[m] = strconv.Itoa(rnd.IntN(4)) + pick(rnd, "", "?", "+")
			rows = []string{m, known[m]}
		}
		gone, model := w.ledger.onlyDelivered(name), "[delivered]"
		var d *ledgerDecision
		var wait int64
		var members []string
		if !gone {
			d, wait, members = w.ledger.seal(name, sealer, at, known)
			model = fmt.Sprintf("[wait %d]", wait)
		}
		if d != nil {
			model = "[decided " + d.String() + "]"
		} else if members != nil {
			model = "[" + strings.TrimSpace("seal "+strings.Join(members, " ")) + "]"
		}
		got := w.run("seal", []string{k.members, k.unsettled, epoch, k.windows, k.length, k.opened}, append([]string{
			"3000", strconv.FormatInt(s.Start.UnixMilli(), 10), strconv.FormatInt(ends, 10), "2000", "5000", "1000", "604800000", sealer, strconv.FormatInt(at, 10),
		}, rows...)...)
		if strings.HasPrefix(got, "[seal ") {
			list := strings.Fields(strings.Trim(got, "[]"))
			slices.Sort(list[1:])
			got = "[" + strings.Join(list, " ") + "]"
		}
		if strings.HasPrefix(got, "[decided ") {
			got = w.reasoned(got)
		}
		w.same("seal "+name, got, model)
	case 2, 3, 4:
		ids := sealedIDs{unique: uint64(rnd.IntN(8)), exact: rnd.IntN(5) > 0, whole: rnd.IntN(4) > 0, under: uint64(rnd.IntN(3)), unanswered: rnd.IntN(4) == 0}
		fit, open := rnd.IntN(6) > 0, rnd.IntN(4) == 0
		sealer, at := pick(rnd, "", "", "a", "b"), w.ledger.now-pick[int64](rnd, 0, 250, 1000, 4000)
		var members []string
		for _, m := range []string{"a", "b", "c"} {
			n, listed := w.ledger.of[name]["m:"+m]
			mark := "="
			if strings.HasSuffix(n, "+") {
				mark = "+"
			}
			if rnd.IntN(12) == 0 {
				listed, mark = !listed, pick(rnd, "+", "=", "0", "?")
			}
			if listed {
				members = append(members, mark+m)
			}
		}
		gone := w.ledger.onlyDelivered(name)
		var d *ledgerDecision
		if !gone {
			d = w.ledger.decide(name, ids, fit, open, sealer, at, members)
		}
		out := w.run("decide", []string{k.epochs, epoch, k.members, k.opened, k.length}, append([]string{strconv.FormatUint(ids.unique, 10), flag(ids.exact), flag(ids.whole), "604800000",
			name, strconv.FormatInt(ends, 10), flag(open), strconv.FormatUint(ids.under, 10), flag(fit), flag(ids.unanswered), sealer, strconv.FormatInt(at, 10), strconv.Itoa(modelForget)}, members...)...)
		if what := fmt.Sprint("decide ", name, ids, fit, open, sealer, at, members); gone {
			w.same(what, out, "[delivered]")
		} else if d == nil {
			w.same(what, out, "[lost]")
		} else {
			w.same(what, w.reasoned(out), "[decided "+d.String()+"]")
		}
	case 5:
		open := rnd.IntN(2) == 0
		list := strings.Fields(strings.Trim(w.run("unpublished", []string{k.epochs}, flag(open)), "[]"))
		slices.Sort(list)
		w.same("unpublished", strings.Join(list, " "), strings.Join(w.ledger.unpublished(open), " "))
	case 6:
		at := w.ledger.now - pick[int64](rnd, 0, 1000, 4000)
		before := pick(rnd, nil, nil, []string{"b"}, []string{"a", "b"})
		before = slices.DeleteFunc(slices.Clone(before), func(m string) bool { return m == me })
		w.same(fmt.Sprint("claim ", me, name, at, before), w.run("claim", []string{epoch, k.leader, k.members},
			append([]string{me, "3000000", me, strconv.FormatInt(at, 10), "2000"}, before...)...), w.ledger.claim(me, name, at, before))
	case 7:
		w.ledger.epoch(name)["written"] = "1"
		w.same("written "+name, w.run("mark", []string{k.epochs, epoch}, "written", "604800000", name), "1")
	case 8:
		w.ledger.delivered(name)
		w.same("delivered "+name, w.run("mark", []string{k.epochs, epoch}, "delivered", "3600000", name), "1")
	case 9:
		w.ledger.leader = ""
		w.do("DEL", k.leader)
		w.trace = append(w.trace, "the lease ends")
	default:
		unsettled := pick(rnd, "", "1000000 1000000")
		n, ago := w.ledger.leave(me, unsettled)
		w.same("leave "+me, w.run("leave", []string{k.members, k.unsettled, k.windows, k.leader, k.opened}, me, "3000", unsettled), fmt.Sprintf("[%d %d]", n, ago))
	}
}

// fault is what befalls both the lane and the ledger.
func (w *twins) fault() {
	switch w.rnd.IntN(8) {
	case 0:
		w.lose()
	case 1, 2, 3:
		w.copyAll()
	default:
		if w.oldLane != nil {
			w.failover()
		}
	}
}

// TestTheScriptsDoWhatTheModelsDo runs short random sequences of operations, with losses of
// data and failovers to an older state between them, on a real Redis and on the models that
// the schedules use: the answers are the same, and so is what is kept.
func TestTheScriptsDoWhatTheModelsDo(t *testing.T) {
	server := startRedis(t)
	client, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{server.Addr}, ForceSingleClient: true, DisableCache: true})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	w := &twins{t: t, server: server, client: client, keys: newLedgerKeys("g")}
	statuses := map[string]int{}
	for seed := range uint64(2000) {
		w.rnd = rand.New(rand.NewPCG(seed, 5))
		w.reset()
		for range 12 {
			switch n := w.rnd.IntN(100); {
			case n < 10:
				w.pass(pick(w.rnd, 0.25, 0.25, 1, 1, 2, 4, 6, 11, 130))
			case n < 18:
				w.fault()
			case seed%3 == 0 && n < 50:
				w.beat()
			case seed%3 == 0:
				w.ledgerStep()
			case n < 75:
				w.batch()
			case n < 85:
				w.sealLane()
			default:
				w.other()
			}
		}
		for _, line := range w.trace {
			_, answer, _ := strings.Cut(line, "-> [")
			status, _, _ := strings.Cut(strings.Trim(answer, "]"), " ")
			statuses[status]++
		}
		w.same("the lane", strings.ReplaceAll(w.run("dump lane", []string{twinLane}), "] [", "\n"), "["+strings.Join(w.lane.dump(), " ")+"]")
		w.same("the ledger", w.run("dump ledger", []string{w.keys.prefix}), "["+strings.Join(w.ledger.dump(), " ")+"]")
	}
	if w.short < 50 {
		t.Errorf("%d batches had the short answer: the sequences do not reach it", w.short)
	}
	for _, status := range []string{"ok", "old", "gap", "lost", "sealed", "frozen", "missing"} {
		if statuses[status] < 50 {
			t.Errorf("%d operations were answered %s: the sequences do not reach it", statuses[status], status)
		}
	}
}
