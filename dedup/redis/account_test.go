package redis

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"verve/counter"
	"verve/dedup"
	"verve/internal/epochtest"
	"verve/internal/settest"
	"verve/internal/testproc"
)

// instance is one of a group, with its own way to Redis.
type instance struct {
	t    *testing.T
	r    *Set
	e    settest.Epochs
	way  *proxy
	log  testproc.Buffer
	file string
	ok   uint64 // ids answered as new in the first epoch
}

// startInstance makes one whose windows of an hour may be sealed at any time.
func startInstance(t *testing.T, server *redisServer, file string, change ...func(*Config)) *instance {
	t.Helper()
	i := &instance{t: t, way: startProxy(t, server.Addr), file: file}
	i.r = newRedis(t, i.way.addr(), append([]func(*Config){patient, func(c *Config) {
		c.File, c.Log = file, zerolog.New(&i.log)
		c.MaxSkew = 2 * time.Hour
	}}, change...)...)
	i.e = settest.NewEpochs(t, i.r)
	testproc.Until(t, "the group has the window", func() bool {
		select {
		case <-i.e.Last().State.(*redisEpoch).group.registered:
			return true
		default:
			return false
		}
	})
	return i
}

// add adds n ids of a name to the first epoch, each until it is answered.
func (i *instance) add(name string, n int) {
	i.t.Helper()
	for id := range n {
		testproc.Until(i.t, "an id is answered", func() bool {
			v, err := i.e.Add(i.t, i.r, 0, fmt.Sprint(name, " ", id))
			if err == nil && v == dedup.Unique {
				i.ok++
			}
			return err == nil
		})
	}
}

func (i *instance) span() counter.Span {
	return counter.Span{Start: time.Unix(0, i.e.At(0)).UTC(), Window: epochtest.Window}
}

// beat has the instance report to the group, and learn of the others.
func (i *instance) beat() {
	i.t.Helper()
	if err := i.r.ledger.beat(i.t.Context()); err != nil {
		i.t.Fatal(err)
	}
}

// report leaves the first epoch, as a turn or SIGTERM does.
func (i *instance) report() {
	i.t.Helper()
	s := i.span()
	c := counter.Count{Start: s.Start, Window: s.Window, Unique: i.ok, Complete: true, Exact: true}
	if ours, err := i.r.ledger.Report(i.t.Context(), c); !ours || err != nil {
		i.t.Fatalf("report: %v, %v", ours, err)
	}
}

// leave is the rest of a stop.
func (i *instance) leave() {
	i.t.Helper()
	if _, _, err := i.r.ledger.Leave(i.t.Context()); err != nil {
		i.t.Fatal(err)
	}
}

// vanish is kill -9: nothing of the instance reaches Redis any more.
func (i *instance) vanish() {
	i.way.refusing.Store(true)
	i.way.cut(0)
}

// record is what the first epoch comes to.
func (i *instance) record() counter.Count {
	i.t.Helper()
	i.report()
	ctx, cancel := context.WithTimeout(i.t.Context(), 60*time.Second)
	defer cancel()
	c, err := i.r.ledger.Seal(ctx, i.span())
	if err != nil {
		i.t.Fatal(err)
	}
	return c
}

// TestRedisForgetsWhileAnInstanceIsAbsent: an instance answers ids and is then not
// there to add them again when Redis loses its data. The record says that it is not
// exact, and the log why; without a loss it is exact, and right.
func TestRedisForgetsWhileAnInstanceIsAbsent(t *testing.T) {
	t.Parallel()
	losses := map[string]func(*redisServer){
		"nothing":  func(*redisServer) {},
		"FLUSHALL": func(s *redisServer) { s.do("FLUSHALL") },
		"restart":  func(s *redisServer) { s.Kill(); s.Start() },
		"a lane": func(s *redisServer) {
			for _, k := range s.keys() {
				if strings.Contains(k, ":lane5") {
					s.do("DEL", k)
				}
			}
		},
	}
	for _, absence := range []string{"killed", "stopped", "restarted", "all restarted"} {
		for loss, lose := range losses {
			t.Run(absence+", "+loss, func(t *testing.T) {
				t.Parallel() // they wait more than they work
				server := startRedis(t)
				dir := t.TempDir()
				a, b := startInstance(t, server, filepath.Join(dir, "a")), startInstance(t, server, filepath.Join(dir, "b"))
				a.add("a", 20)
				b.add("b", 20)
				ok := a.ok + b.ok
				b.beat()
				a.beat()
				if absence != "killed" {
					b.report()
					b.leave()
				}
				b.vanish()
				if absence == "all restarted" {
					a.report()
					a.leave()
					a.vanish()
				}
				lose(server)
				last := a
				switch absence {
				case "restarted":
					startInstance(t, server, b.file).report()
				case "all restarted":
					last = startInstance(t, server, a.file)
					startInstance(t, server, b.file).report()
					ok -= last.ok
				}
				before := last.ok
				last.add("b", 5) // which b has answered for
				ok += last.ok - before
				c := last.record()
				if wrong := c.Unique != ok; wrong && c.Exact {
					t.Errorf("%d ids were answered as new, the record is %+v", ok, c)
				}
				if loss != "nothing" && (c.Exact || !strings.Contains(last.log.String(), "the record of the window is not exact")) {
					t.Errorf("ids are lost, the record is %+v, the log %s", c, last.log.String())
				}
				if loss == "nothing" && (!c.Exact || c.Unique != ok) {
					t.Errorf("nothing is lost of %d ids, the record is %+v, the log %s", ok, c, last.log.String())
				}
			})
		}
	}
}

// TestRedisForgetsWhileAllAreThere: the instances add their ids again, which the
// numbers of their answers prove.
func TestRedisForgetsWhileAllAreThere(t *testing.T) {
	t.Parallel() // it mostly waits
	server := startRedis(t)
	a, b := startInstance(t, server, ""), startInstance(t, server, "")
	a.add("a", 20)
	b.add("b", 20)
	server.do("FLUSHALL")
	b.report()
	if c := a.record(); c.Unique != 40 || !c.Exact {
		t.Errorf("40 ids were answered as new, the record is %+v, the log %s", c, a.log.String())
	}
}

// TestAStrangerRemembersTheAccount: an instance that was not in a window knows what the
// others have answered in it, and what it came to. If Redis loses both and all who were in
// the window are gone, it writes them again.
func TestAStrangerRemembersTheAccount(t *testing.T) {
	t.Parallel() // it mostly waits
	server := startRedis(t)
	a := startInstance(t, server, "")
	a.add("a", 3)
	stranger := openLedger(Config{Group: a.r.cfg.Group, Window: epochtest.Window, MaxSkew: 2 * time.Hour}, "stranger", a.r)
	beat := func() answers {
		t.Helper()
		for range 2 { // the second one names the windows that the first has learnt of
			if err := stranger.beat(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		stranger.mu.Lock()
		defer stranger.mu.Unlock()
		if e := stranger.find(a.span()); e != nil {
			return maps.Clone(e.answers)
		}
		return nil
	}
	a.report()
	if rows := beat(); rows[a.r.ledger.member] != "3" {
		t.Errorf("the stranger knows of %v", rows)
	}
	c := a.record()
	beat()
	a.leave()
	server.do("FLUSHALL")
	beat()
	again, err := stranger.Seal(t.Context(), a.span())
	if err != nil || again.Unique != 3 || again.Exact != c.Exact || !again.SealedAt.Equal(c.SealedAt) {
		t.Errorf("the record was %+v, the stranger has %+v, %v", c, again, err)
	}
	if spans, err := stranger.Reconcile(t.Context(), true); err != nil || len(spans) != 1 {
		t.Errorf("the group is to publish %v, %v", spans, err)
	}
}

// TestFullRedisComesBack: what seals and frees works while Redis is full, so ids of
// the next epoch are taken.
func TestFullRedisComesBack(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	i := startInstance(t, server, "", func(c *Config) { c.Timeout = time.Second })
	var used int
	if _, err := fmt.Sscan(strings.Split(strings.Split(server.do("INFO", "memory"), "used_memory:")[1], "\r")[0], &used); err != nil {
		t.Fatal(err)
	}
	server.do("CONFIG", "SET", "maxmemory", fmt.Sprint(used+1_000_000))
	for n := 0; ; n++ {
		v, err := i.e.Add(t, i.r, 0, fmt.Sprint("an id that is long enough ", n))
		if err != nil && strings.HasPrefix(server.do("SET", "more", "x"), "OOM") {
			break
		}
		if v == dedup.Unique {
			i.ok++
		}
		if n > 100_000 {
			t.Fatal("Redis is not full")
		}
	}
	i.beat() // a lane and the ledger can both write
	if c := i.record(); c.Unique != i.ok || !c.Exact {
		t.Errorf("%d ids were answered as new, the record is %+v, the log %s", i.ok, c, i.log.String())
	}
	testproc.Until(t, "an id of the next epoch is taken", func() bool {
		v, err := i.e.Add(t, i.r, 1, "1")
		return v == dedup.Unique && err == nil
	})
}

// TestSealWaitsForTheReplayAfterHello: an instance lost its last writes at a failover,
// has said hello, and has not added them again yet when another seals.
func TestSealWaitsForTheReplayAfterHello(t *testing.T) {
	t.Parallel()
	server, way, a, b, ea, eb := pairByProxy(t)
	for i := range 10 {
		wantInTime(t, a, ea, fmt.Sprint("a", i), dedup.Unique)
	}
	if got := server.do("SAVE"); got != "OK" {
		t.Fatal(got)
	}
	for i := range 10 {
		wantInTime(t, a, ea, fmt.Sprint("lost", i), dedup.Unique)
	}
	way.refusing.Store(true)
	way.cut(0)
	server.Kill()
	server.Start()                                   // the last ten are gone
	way.latency.Store(int64(150 * time.Millisecond)) // of replies: a is far away
	way.refusing.Store(false)
	var ids sealedIDs
	testproc.Until(t, "b seals", func() bool { // its first try may meet the connection that was cut
		var err error
		ids, err = b.sealIDs(t.Context(), counter.Span{Start: time.Unix(0, eb.At(0)), Window: epochtest.Window}, nil)
		return err == nil
	})
	if ids.unique != 20 && ids.exact && ids.whole {
		t.Errorf("20 ids were answered as new, the seal says %+v", ids)
	}
}

// TestFailbackToTheProcessThatBegan: from the first master to a replica and back,
// within an epoch, while an instance is not there. The process is the one again that
// began the epoch, the data are not.
func TestFailbackToTheProcessThatBegan(t *testing.T) {
	t.Parallel()
	m1 := startRedis(t, "--repl-diskless-sync-delay", "0")
	a, b := startInstance(t, m1, ""), startInstance(t, m1, "")
	a.add("a", 10)
	b.add("b", 10)
	m2 := startRedis(t, "--repl-diskless-sync-delay", "0") // a replica with what is there now
	host, p1, _ := net.SplitHostPort(m1.Addr)
	_, p2, _ := net.SplitHostPort(m2.Addr)
	m2.do("REPLICAOF", host, p1)
	testproc.Until(t, "synced", func() bool { return strings.Contains(m2.do("INFO", "replication"), "master_link_status:up") })
	m2.do("REPLICAOF", "NO", "ONE") // the failover: what m1 gets from here on is lost
	a.add("lost", 10)
	a.beat()
	b.beat()
	a.vanish()
	m1.do("REPLICAOF", host, p2)
	testproc.Until(t, "synced", func() bool { return strings.Contains(m1.do("INFO", "replication"), "master_link_status:up") })
	m1.do("REPLICAOF", "NO", "ONE") // and back
	b.add("more", 1)
	if c := b.record(); c.Exact {
		t.Errorf("31 ids were answered as new, the record is %+v", c)
	}
}

// TestSealIsWithAReplica: a record is exact only if a replica has the seal. So a replica
// that becomes the master takes no ids of the window. A master whose replica does not answer
// may be cut off from one that was promoted, and from other instances.
func TestSealIsWithAReplica(t *testing.T) {
	t.Parallel()
	m1 := startRedis(t, "--repl-diskless-sync-delay", "0")
	m2 := startRedis(t, "--repl-diskless-sync-delay", "0")
	host, p1, _ := net.SplitHostPort(m1.Addr)
	m2.do("REPLICAOF", host, p1)
	testproc.Until(t, "synced", func() bool { return strings.Contains(m2.do("INFO", "replication"), "master_link_status:up") })
	a := startInstance(t, m1, "")
	a.add("a", 10)
	span := a.span()
	testproc.Until(t, "the replica confirms a seal in time", func() bool {
		span.Start = span.End()
		ids, err := a.r.sealIDs(t.Context(), span, nil)
		return err == nil && ids.exact && ids.whole
	})
	if name := epochName(span); !strings.Contains(m2.do("HGET", a.r.lanes[0].redisKey, "Z"), name) {
		t.Errorf("the replica has confirmed %s, and lacks it", name)
	}
	m2.pause() // as if the way to it was cut
	if c := a.record(); c.Exact || c.Unique != 10 {
		t.Errorf("the replica may be the master by now, the record is %+v", c)
	}
	m2.resume()
}

// TestDoubtThatLapsedIsOver: an instance cannot take back an id when others, after it
// was silent for too long, have answered that they know it.
func TestDoubtThatLapsedIsOver(t *testing.T) {
	server, way, a, b, ea, eb := pairByProxy(t)
	wantInTime(t, a, ea, "before", dedup.Unique)
	goDeaf(t, server, way, a)
	if v, err := ea.Add(t, a, 0, "42"); !errors.Is(err, dedup.ErrUnavailable) {
		t.Fatalf("without a reply: %v, %v", v, err)
	}
	testproc.Until(t, "the id is in Redis", func() bool { return strings.Contains(strings.Join(server.keys(), "\n"), ":d") })
	way.refusing.Store(true)
	way.cut(0)
	if v, err := eb.Add(t, b, 0, "42"); !errors.Is(err, dedup.ErrUnavailable) {
		t.Fatalf("while it is in doubt: %v, %v", v, err)
	}
	// Twenty seconds later.
	server.do("EVAL", `local s = {cmsgpack.unpack(redis.call('HGET', KEYS[1], ARGV[1]))}
		s[2] = s[2] - 20
		redis.call('HSET', KEYS[1], ARGV[1], cmsgpack.pack(unpack(s)))`, "1", a.lanes[0].redisKey, "S"+a.cfg.session)
	testproc.Until(t, "the doubt lapses", func() bool {
		v, err := eb.Add(t, b, 0, "42")
		if err == nil && v != dedup.Repeat {
			t.Fatalf("when the doubt has lapsed: %v", v)
		}
		return err == nil
	})
	way.deaf.Store(false)
	way.refusing.Store(false)
	untilSettled(t, a)
	if n := server.do("SCARD", a.lanes[0].redisKey+":"+eb.Last().State.(*redisEpoch).name+":d"); n != "1" {
		t.Errorf("%s ids are in Redis: one was taken back that b has answered for", n)
	}
}

// TestLossInARetiredEpochDoesNotHoldItsSeal: an instance that stops has let go of its last epoch,
// and adds none of it again. It was heard after the loss, so the seal does not wait for it.
func TestLossInARetiredEpochDoesNotHoldItsSeal(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	r := newRedis(t, server.Addr)
	e := settest.NewEpochs(t, r)
	wantInTime(t, r, e, "42", dedup.Unique)
	e.Last().State.Retire()
	server.do("FLUSHALL")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	testproc.Until(t, "the loss is noticed", func() bool { return server.do("HEXISTS", r.lanes[0].redisKey, "losses") == "1" })
	ids, err := r.sealIDs(ctx, counter.Span{Start: time.Unix(0, e.At(0)), Window: epochtest.Window}, []string{"=" + r.cfg.session})
	if ids.unique != 0 || err != nil {
		t.Errorf("sealed %+v, %v", ids, err)
	}
}

// TestSilentInstanceTaintsNoWindowBehindALoss: Redis has nothing of an instance that is silent
// since before a loss. It may have ids in a window that had begun by then, and in no later one.
func TestSilentInstanceTaintsNoWindowBehindALoss(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	r := newRedis(t, server.Addr)
	e := settest.NewEpochs(t, r)
	wantInTime(t, r, e, "42", dedup.Unique)
	now := time.Now().Truncate(time.Second)
	for _, tt := range []struct {
		start time.Time
		whole bool
	}{{now, false}, {now.Add(time.Hour), true}} {
		ids, err := r.sealIDs(t.Context(), counter.Span{Start: tt.start, Window: time.Second}, []string{"?gone"})
		if err != nil || ids.whole != tt.whole {
			t.Errorf("a window from %v on: %+v, %v", tt.start.Sub(now), ids, err)
		}
	}
}

// TestALateBatchIsNotTakenBack: the batch of an instance that was cut off reaches Redis when all
// that it had in doubt has lapsed. It has the others look for its ids again only with a batch
// that notes the time; what they have answered by then stays true.
func TestALateBatchIsNotTakenBack(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"without a token", "with a token"} {
		t.Run(kind, func(t *testing.T) {
			server := startRedis(t)
			r := newRedis(t, server.Addr)
			key := strings.Replace(r.lanes[0].redisKey, r.cfg.Group, "late", 1)
			epoch, id, codes := []string{epochName(counter.Span{Start: time.Unix(0, 0), Window: time.Hour}), "other", "next"}, packed("42"), "0"
			named := []string{id, "", "", ""}
			if kind == "with a token" {
				named = append([]string{"", "", "", "", packed("d", "42", "T", "")}, append(epoch[1:], "10", "0")...)
				codes = "6"
			}
			gen := ""
			batch := func(session, seq, mode, noting string, lists []string) string {
				t.Helper()
				args := append([]string{"batch", session, seq, mode, epoch[0], gen, idsTTL, freezeTime, "1", noting}, lists...)
				a, err := r.call(t.Context(), key, args...)
				if err != nil || a.status != statusOK {
					t.Fatalf("%s of %s: %+v, %v", mode, session, a, err)
				}
				gen = a.gen
				return strings.TrimSuffix(a.codes, codeInexact)
			}
			first := []string{packed("1"), "", "", ""}
			batch("a", "1", modeAdd, "1", first)
			// Twenty seconds later.
			server.do("EVAL", `local s = {cmsgpack.unpack(redis.call('HGET', KEYS[1], 'Sa'))}
				s[2] = s[2] - 20
				redis.call('HSET', KEYS[1], 'Sa', cmsgpack.pack(unpack(s)))`, "1", key)
			batch("b", "1", modeAdd, "1", first)
			if got := batch("a", "2", modeAdd, "0", named); got != "1" {
				t.Fatalf("the late batch: code %s", got)
			}
			if got := batch("b", "2", modeAdd, "1", named); got != codes {
				t.Fatalf("another instance has the id: code %s, want %s", got, codes)
			}
			if got := batch("a", "3", modeTake, "2", named); got != "5" {
				t.Errorf("the id is taken back: code %s, want 5", got)
			}
			if n := server.do("SISMEMBER", key+":"+epoch[0]+":d", "42"); n != "1" {
				t.Error("an id is gone that another instance has answered for")
			}
		})
	}
}

// TestARestartedInstanceLeavesNothingInDoubt: a retry of an id in the last batch of an instance
// that was killed has its answer as soon as the instance is back, and so has another attempt.
// Where the process of before lives on, it cannot take the id back.
func TestARestartedInstanceLeavesNothingInDoubt(t *testing.T) {
	t.Parallel()
	server := startRedis(t)
	way := startProxy(t, server.Addr)
	named := func(name string) func(*Config) { return func(c *Config) { c.Instance = name } }
	a, b := newRedis(t, way.addr(), named("a")), newRedis(t, server.Addr, named("b"))
	ea, eb := settest.NewEpochs(t, a), settest.NewEpochs(t, b)
	wantInTime(t, a, ea, "before", dedup.Unique)
	goDeaf(t, server, way, a)
	if v, err := addAs(t, a, ea, 0, "42", "", "T"); !errors.Is(err, dedup.ErrUnavailable) {
		t.Fatalf("without a reply: %v, %v", v, err)
	}
	set := a.lanes[0].redisKey + ":" + epochName(counter.Span{Start: time.Unix(0, ea.At(0)), Window: epochtest.Window}) + ":d"
	testproc.Until(t, "the id is in Redis", func() bool { return server.do("SISMEMBER", set, "42") == "1" })
	way.refusing.Store(true)
	way.cut(0)

	inDoubt := func() string { return server.do("HEXISTS", a.lanes[0].redisKey, "I"+a.cfg.session) }
	start := func(name string) {
		r := newRedis(t, server.Addr, named(name))
		settest.NewEpochs(t, r)
		testproc.Until(t, "Redis has the session", func() bool {
			return server.do("HEXISTS", r.lanes[0].redisKey, "S"+r.cfg.session) == "1"
		})
	}
	start("c")
	if got := inDoubt(); got != "1" {
		t.Fatalf("after the start of another instance the id is in doubt: %s, want 1", got)
	}
	start("a")
	if got := inDoubt(); got != "0" {
		t.Fatalf("when its instance is back the id is in doubt: %s, want 0", got)
	}
	for token, want := range map[string]dedup.Verdict{"T": dedup.Replayed, "U": dedup.Repeat} {
		untilAs(t, b, eb, 0, "42", "", token, want)
	}

	way.deaf.Store(false)
	way.refusing.Store(false)
	untilSettled(t, a)
	if n, exact := sealed(t, eb, b, 0); n != 2 || exact {
		t.Errorf("sealed %d, exact %v; want 2, false", n, exact)
	}
}

// TestGroupKnowsOfAnIDBeforeItIsRefused: when a request has waited for half of its time, the
// group learns that its id may be in Redis without an answer. So an instance that is killed
// right after the refusal does not leave a record that counts the id and is exact.
func TestGroupKnowsOfAnIDBeforeItIsRefused(t *testing.T) {
	t.Parallel() // it mostly waits
	server := startRedis(t)
	a := startInstance(t, server, "")
	b := startInstance(t, server, "", func(c *Config) { c.Timeout = time.Hour }) // the test refuses
	a.add("a", 3)
	b.add("b", 3)
	goDeaf(t, server, b.way, b.r)
	refused := make(chan error, 1)
	go func() {
		_, err := b.e.Add(t, b.r, 0, "42")
		refused <- err
	}()
	l := &b.r.lanes[0]
	testproc.Until(t, "the group knows", func() bool {
		l.expire(int64(time.Since(b.r.start) + 45*time.Minute))
		row := server.do("HGET", b.r.ledger.keys.ofEpoch(b.span()), "d:"+b.r.ledger.member)
		return row == "1"
	})
	select {
	case err := <-refused:
		t.Fatalf("the request is answered: %v", err)
	default:
	}
	b.vanish()
	l.expire(int64(time.Since(b.r.start) + 2*time.Hour))
	if err := <-refused; !errors.Is(err, dedup.ErrUnavailable) {
		t.Errorf("the request: %v", err)
	}
	if c := a.record(); c.Exact || c.Unique != 7 {
		t.Errorf("6 ids were answered as new, one was refused: the record is %+v", c)
	}
}

// TestSecondRecordOfAWindowIsLogged: two parts of a group were apart and each has
// decided what the window came to.
func TestSecondRecordOfAWindowIsLogged(t *testing.T) {
	server := startRedis(t)
	i := startInstance(t, server, "")
	i.add("a", 3)
	i.record()
	server.do("HSET", i.r.ledger.keys.ofEpoch(i.span()), "unique", "99")
	i.beat()
	i.beat()
	if got := strings.Count(i.log.String(), "two records"); got != 1 {
		t.Errorf("%d lines say so, want 1: %s", got, i.log.String())
	}
}

// TestVersionsWithOtherKeysRefuseEachOther: one that keeps its data in another form
// would not see the ids of this one.
func TestVersionsWithOtherKeysRefuseEachOther(t *testing.T) {
	t.Parallel() // it mostly waits
	server := startRedis(t)
	lanes := "verve:{" + laneTags[0] + "}:test:lanes"
	server.do("SET", lanes, "1") // as versions before the layout had a number
	r := newRedisAway(t, server.Addr)
	e := settest.NewEpochs(t, r)
	testproc.Until(t, "it says so", func() bool {
		ready, reason := r.Health()
		return !ready && strings.Contains(reason, "version")
	})
	if v, err := e.Add(t, r, 0, "42"); !errors.Is(err, dedup.ErrUnavailable) {
		t.Errorf("an id: %v, %v; want ErrUnavailable", v, err)
	}
	if keys := strings.Join(server.keys(), " "); strings.Contains(keys, "epoch") {
		t.Errorf("it takes part in the group: %s", keys)
	}
	server.do("DEL", lanes) // the other stopped, or Redis has lost it
	for began := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		got := server.do("GET", lanes)
		if time.Since(began) > otherSeenFor/2 {
			break
		}
		if strings.HasPrefix(got, "4") {
			t.Fatalf("the key has %s at once: others that are alive were to be first", got)
		}
	}
	testproc.Until(t, "ids are taken", func() bool {
		v, err := e.Add(t, r, 0, "42")
		return v == dedup.Unique && err == nil
	})
	// What the others read as the number of lanes is one that they cannot have.
	if got := server.do("GET", lanes); got != "5001" {
		t.Errorf("the key has %s, want 5001", got)
	}
}
