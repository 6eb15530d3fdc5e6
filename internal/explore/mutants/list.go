package main

import "verve/internal/explore/overlay"

var mutants = []mutant{
	// Entering and leaving.
	{"no second look at the open epoch", "counter", overlay.Edit{
		File: "counter/counter.go",
		Old:  "if c.open.Load() == e {\n\t\t\treturn Entry{e, s}, true\n\t\t}",
		New:  "if true {\n\t\t\treturn Entry{e, s}, true\n\t\t}",
	}, nil},
	{"the second look comes before entering", "counter", overlay.Edit{
		File: "counter/counter.go",
		Old:  "s.entered.Add(n)",
		New:  "still := c.open.Load() == e; s.entered.Add(n)",
	}, []overlay.Edit{{File: "counter/counter.go", Old: "if c.open.Load() == e {\n\t\t\treturn Entry{e, s}, true", New: "if still {\n\t\t\treturn Entry{e, s}, true"}}},
	{"entered by a load and a store", "counter", overlay.Edit{
		File: "counter/counter.go", Old: "s.entered.Add(n)", New: "s.entered.Store(s.entered.Load() + n)",
	}, nil},
	{"a request that found the epoch turned does not leave it", "counter", overlay.Edit{
		File: "counter/counter.go", Old: "\t\ts.void.Add(n)\n", New: "\n",
	}, nil},
	{"a request that found the epoch turned leaves as one", "counter", overlay.Edit{
		File: "counter/counter.go", Old: "\t\ts.void.Add(n)\n", New: "\t\ts.void.Add(1)\n",
	}, nil},
	{"who entered is read before who left", "counter", overlay.Edit{
		File: "counter/epoch.go",
		Old:  "left := s.unique.Load() + s.repeats.Load() + s.void.Load()\n\treturn s.entered.Load() == left",
		New:  "entered := s.entered.Load()\n\treturn entered == s.unique.Load()+s.repeats.Load()+s.void.Load()",
	}, nil},
	{"idle forgets who left without counting", "counter", overlay.Edit{
		File: "counter/epoch.go", Old: "s.repeats.Load() + s.void.Load()", New: "s.repeats.Load()",
	}, nil},
	{"one stripe that is idle is enough", "counter", overlay.Edit{
		File: "counter/epoch.go", Old: "if !e.stripes[i].idle() {\n\t\t\treturn false", New: "if e.stripes[i].idle() {\n\t\t\treturn true",
	}, nil},
	{"a unique id is counted by a load and a store", "counter", overlay.Edit{
		File: "counter/epoch.go", Old: "e.stripe.unique.Add(1)", New: "e.stripe.unique.Store(e.stripe.unique.Load() + 1)",
	}, nil},
	{"a batch leaves before its unique ids are counted", "counter", overlay.Edit{
		File: "counter/epoch.go", Old: "if unique > 0 {\n\t\te.stripe.unique.Add(unique)", New: "if unique > 0 {\n\t\te.stripe.void.Add(unique); defer e.stripe.void.Add(-unique); e.stripe.unique.Add(unique)",
	}, nil},
	{"a batch leaves with its repeats as void, and counts them behind that", "counter", overlay.Edit{
		File: "counter/epoch.go", Old: "\te.stripe.repeats.Add(repeats)", New: "\te.stripe.void.Add(repeats); e.stripe.repeats.Add(repeats); e.stripe.void.Add(-repeats)",
	}, nil},
	// Turning and closing.
	{"no second look at the end under the lock", "counter", overlay.Edit{
		File: "counter/counter.go", Old: "if e == nil || now < e.end {\n\t\treturn // turned meanwhile", New: "if e == nil {\n\t\treturn // turned meanwhile",
	}, nil},
	{"TurnFrom does not look again under the lock", "counter", overlay.Edit{
		File: "counter/counter.go", Old: "if c.open.Load() == e {\n\t\tc.advance(e, e.end, e.end)", New: "if c.open.Load() != nil {\n\t\tc.advance(e, e.end, e.end)",
	}, nil},
	{"the lock is not taken for a turn", "counter", overlay.Edit{
		File: "counter/counter.go", Old: "func (c *Counter) turn(now int64) {\n\tc.mu.Lock()\n\tdefer c.mu.Unlock()", New: "func (c *Counter) turn(now int64) {",
	}, nil},
	{"the epoch is handed to the closer before it is left", "counter", overlay.Edit{
		File: "counter/counter.go", Old: "\tc.open.Store(next) // from here on nobody enters e\n", New: "\tdefer c.open.Store(next)\n",
	}, []overlay.Edit{{File: "counter/counter.go", Old: "\tc.leave(e)\n}\n\n// Seal ends", New: "\tc.mu.Unlock(); c.mu.Lock(); c.leave(e); c.mu.Unlock(); c.mu.Lock()\n}\n\n// Seal ends"}}},
	{"Seal hands the epoch over before it closes it", "counter", overlay.Edit{
		File: "counter/counter.go", Old: "\tc.open.Store(nil)\n\tc.leave(e)\n", New: "\tc.leave(e)\n\tc.mu.Unlock()\n\tc.mu.Lock()\n\tc.open.Store(nil)\n",
	}, nil},
	{"the closer does not wait", "counter", overlay.Edit{
		File: "counter/closer.go", Old: "wait := drainMin; !e.Idle();", New: "wait := drainMin; false;",
	}, nil},
	{"the count is read before the wait", "counter", overlay.Edit{
		File: "counter/closer.go", Old: "if err = drain(ctx, e); err != nil {", New: "unique := e.Unique(); if err = drain(ctx, e); err != nil {",
	}, []overlay.Edit{{File: "counter/closer.go", Old: "count.Unique, count.Repeats, count.Exact = e.Unique(),", New: "count.Unique, count.Repeats, count.Exact = unique,"}}},
	{"an empty epoch is dropped before it was left", "counter", overlay.Edit{
		File: "counter/counter.go", Old: "\tc.open.Store(next) // from here on nobody enters e\n", New: "\tidle := e.Idle() && e.Unique()+e.Repeats() == 0; c.open.Store(next)\n",
	}, []overlay.Edit{{File: "counter/counter.go", Old: "n >= maxWaiting && e.Idle() && e.Unique()+e.Repeats() == 0", New: "n >= maxWaiting && idle"}}},
	{"an epoch is dropped while a request is in it", "counter", overlay.Edit{
		File: "counter/counter.go", Old: "n >= maxWaiting && e.Idle() &&", New: "n >= maxWaiting &&",
	}, nil},
	{"a turn keeps the spare that it has used", "counter", overlay.Edit{
		File: "counter/counter.go", Old: "\tc.spare = nil\n\te.number", New: "\te.number",
	}, nil},
	{"closed counts are added after the lock", "counter", overlay.Edit{
		File: "counter/closer.go", Old: "\tif !e.recovered {\n\t\tc.closed.unique", New: "\tc.mu.Unlock(); c.mu.Lock()\n\tif !e.recovered {\n\t\tc.closed.unique",
	}, nil},
	{"a repeat is counted by a load and a store", "counter", overlay.Edit{
		File: "counter/epoch.go", Old: "e.stripe.repeats.Add(1)", New: "e.stripe.repeats.Store(e.stripe.repeats.Load() + 1)",
	}, nil},
	{"a request that counted nothing leaves by a load and a store", "counter", overlay.Edit{
		File: "counter/epoch.go", Old: "e.stripe.void.Add(1)", New: "e.stripe.void.Store(e.stripe.void.Load() + 1)",
	}, nil},
	{"the part of a batch that counted nothing leaves by a load and a store", "counter", overlay.Edit{
		File: "counter/epoch.go", Old: "e.stripe.void.Add(void)", New: "e.stripe.void.Store(e.stripe.void.Load() + void)",
	}, nil},
	{"Seal takes no lock", "counter", overlay.Edit{
		File: "counter/counter.go", Old: "func (c *Counter) Seal() {\n\tc.mu.Lock()\n\tdefer c.mu.Unlock()", New: "func (c *Counter) Seal() {",
	}, nil},
	{"TurnFrom takes no lock", "counter", overlay.Edit{
		File: "counter/counter.go", Old: "\tc.mu.Lock()\n\tdefer c.mu.Unlock()\n\tif c.open.Load() == e {\n\t\tc.advance", New: "\tif c.open.Load() == e {\n\t\tc.advance",
	}, nil},
	{"Stats takes no lock", "counter", overlay.Edit{
		File: "counter/counter.go", Old: "func (c *Counter) Stats() Stats {\n\tc.mu.Lock()\n\tdefer c.mu.Unlock()", New: "func (c *Counter) Stats() Stats {",
	}, nil},
	{"the closer looks for epochs without the lock", "counter", overlay.Edit{
		File: "counter/closer.go", Old: "\tc.mu.Lock()\n\tdefer c.mu.Unlock()\n\tif len(c.turned) == 0 {", New: "\tif len(c.turned) == 0 {",
	}, nil},
	// Keys.
	{"a key is added without the lock", "counter", overlay.Edit{
		File: "counter/keys.go", Old: "\tks.adding.Lock()\n\tdefer ks.adding.Unlock()\n\tif ks.over {", New: "\tif ks.over {",
	}, nil},
	{"a key is put over another one", "counter", overlay.Edit{
		File: "counter/keys.go", Old: "\t\tif at == 0 {", New: "\t\tif at == 0 || table.at(at).hash != hash {",
	}, nil},
	{"ids under a key are counted by a load and a store", "counter", overlay.Edit{
		File: "counter/keys.go", Old: "k.unique.Add(n) == n {", New: "k.unique.Load() == 0 {\n\t\tk.unique.Store(n)",
	}, []overlay.Edit{{File: "counter/keys.go", Old: "\t\tks.filled.Add(1)\n\t}", New: "\t\tks.filled.Add(1)\n\t} else {\n\t\tk.unique.Store(k.unique.Load() + n)\n\t}"}}},
	{"a key that has ids is counted by a load and a store", "counter", overlay.Edit{
		File: "counter/keys.go", Old: "ks.filled.Add(1)", New: "ks.filled.Store(ks.filled.Load() + 1)",
	}, nil},
	{"the bound of the keys is looked at before the lock alone", "counter", overlay.Edit{
		File: "counter/keys.go", Old: "if ks.used >= ks.max || ks.memory.full() {\n\t\t\t\treturn nil", New: "if ks.memory.full() {\n\t\t\t\treturn nil",
	}, nil},
	{"the memory of the keys is counted by a load and a store", "counter", overlay.Edit{
		File: "counter/keys.go", Old: "ks.memory.used.Add(n)", New: "ks.memory.used.Store(ks.memory.used.Load() + n)",
	}, nil},
	{"the memory of keys that are read is used again", "counter", overlay.Edit{
		File: "counter/keys.go", Old: "ks.memory != nil && ks.late.Load() == 0 {", New: "ks.memory != nil {",
	}, nil},
	// The table.
	{"a narrow slot is taken by a store", "dedup", overlay.Edit{
		File: "dedup/table.go", Old: "if slot.CompareAndSwap(w, word) {", New: "if slot.Store(word); true {",
	}, nil},
	{"a narrow slot that was lost is passed over", "dedup", overlay.Edit{
		File: "dedup/table.go", Old: "// Lost the slot: to this id, to another one or to a later epoch.", New: "break",
	}, nil},
	{"a narrow slot of a later epoch is free", "dedup", overlay.Edit{
		File: "dedup/table.go", Old: "if newer(t, tag) {\n\t\t\t\treturn turned, int(n)", New: "if false {\n\t\t\t\treturn turned, int(n)",
	}, nil},
	{"a narrow slot of a later epoch is another id's", "dedup", overlay.Edit{
		File: "dedup/table.go", Old: "if newer(t, tag) {\n\t\t\t\treturn turned, int(n)", New: "if newer(t, tag) {\n\t\t\t\tbreak",
	}, nil},
	{"tags that come round are older", "dedup", overlay.Edit{
		File: "dedup/table.go", Old: "return t != 0 && age(t, now) > halfLap", New: "return t > now",
	}, nil},
	{"a wide slot is taken by a store", "dedup", overlay.Edit{
		File: "dedup/table.go", Old: "if !slot.CompareAndSwap(w, word|pending) {", New: "if slot.Store(word | pending); false {",
	}, nil},
	{"no pending bit", "dedup", overlay.Edit{
		File: "dedup/table.go", Old: "slot.CompareAndSwap(w, word|pending)", New: "slot.CompareAndSwap(w, word)",
	}, nil},
	{"the pending bit is cleared before the second word is written", "dedup", overlay.Edit{
		File: "dedup/table.go", Old: "other.Store(second)\n\t\t\t\tslot.Store(word)", New: "slot.Store(word)\n\t\t\t\tother.Store(second)",
	}, nil},
	{"a pending word is not waited for", "dedup", overlay.Edit{
		File: "dedup/table.go", Old: "case w&pending != 0:", New: "case w&pending != 0 && t != tag:",
	}, nil},
	{"a pending word of an older epoch is taken", "dedup", overlay.Edit{
		File: "dedup/table.go", Old: "case w&pending != 0:", New: "case w&pending != 0 && t == tag:",
	}, nil},
	{"the first word is not looked at again", "dedup", overlay.Edit{
		File: "dedup/table.go", Old: "if slot.Load() != w {", New: "if false {",
	}, nil},
	{"the second word is read before the first", "dedup", overlay.Edit{
		File: "dedup/table.go", Old: "w := slot.Load()\n\t\t\tt := w & tagMask &^ pending", New: "s := other.Load(); w := slot.Load()\n\t\t\tt := w & tagMask &^ pending",
	}, []overlay.Edit{{File: "dedup/table.go", Old: "s := other.Load()\n\t\t\t\tif slot", New: "if slot"}}},
	{"a wide slot of a later epoch is another id's", "dedup", overlay.Edit{
		File: "dedup/table.go", Old: "case newer(t, tag):\n\t\t\t\treturn turned, int(n)", New: "case newer(t, tag):",
	}, nil},
	// Growing, sweeping, the limit.
	{"each request that finds the last level full adds one", "dedup", overlay.Edit{
		File: "dedup/table.go", Old: "if t.depth > have {\n\t\treturn false, nil", New: "if false {\n\t\treturn false, nil",
	}, nil},
	{"a level is added without the lock", "dedup", overlay.Edit{
		File: "dedup/table.go", Old: "t.mu.Lock()\n\tdefer t.mu.Unlock()\n\tif t.depth > have", New: "if t.depth > have",
	}, nil},
	{"a full level is the end of the search", "dedup", overlay.Edit{
		File: "dedup/memory.go", Old: "if err := grow(m, v.narrow, i, func()", New: "if err := grow(m, v.narrow, i+1, func()",
	}, nil},
	{"the cleaner empties by a store", "dedup", overlay.Edit{
		File: "dedup/cleaner.go", Old: "if words[i].CompareAndSwap(w, 0) {", New: "if words[i].Store(0); true {",
	}, nil},
	{"the cleaner takes the youngest for old", "dedup", overlay.Edit{
		File: "dedup/cleaner.go", Old: "if t == 0 || newer(t, now) || admitted-age(t, now) > floor {", New: "if t == 0 || newer(t, now) {",
	}, nil},
	{"what is left of the limit is looked at before the lock", "dedup", overlay.Edit{
		File: "dedup/memory.go", Old: "\tv.mu.Lock()\n\tdefer v.mu.Unlock()\n\tlook := v.left == 0", New: "\tlook := v.left == 0\n\tv.mu.Lock()\n\tdefer v.mu.Unlock()",
	}, nil},
	{"the strict limit takes no lock", "dedup", overlay.Edit{
		File: "dedup/memory.go", Old: "\tv.mu.Lock()\n\tdefer v.mu.Unlock()\n\tlook := v.left == 0", New: "\tlook := v.left == 0",
	}, nil},
	{"a repeat takes from what is left", "dedup", overlay.Edit{
		File: "dedup/memory.go", Old: "case taken:\n\t\tv.left--", New: "case taken, found:\n\t\tv.left -= min(v.left, 1)",
	}, nil},
	{"no id finds that the limit is near", "dedup", overlay.Edit{
		File: "dedup/memory.go", Old: "if v.tight.Load() {\n\t\treturn m.insertTight", New: "if false {\n\t\treturn m.insertTight",
	}, nil},
	{"what is left is found without the lock", "dedup", overlay.Edit{
		File: "dedup/memory.go", Old: "\tv.mu.Lock()\n\tdefer v.mu.Unlock()\n\tif !v.tight.Load() {", New: "\tif !v.tight.Load() {",
	}, nil},
	{"what is left is found before the flag is up", "dedup", overlay.Edit{
		File: "dedup/memory.go", Old: "v.tight.Store(true)\n\t\tv.left = less(", New: "v.left = less(",
	}, []overlay.Edit{{File: "dedup/memory.go", Old: "v.before.sum()+e.Unique()+fresh)\n", New: "v.before.sum()+e.Unique()+fresh); v.tight.Store(true)\n"}}},
	// The journal.
	{"the head counts a record before it is there", "dedup", overlay.Edit{
		File: "dedup/segment.go", Old: "n := c.body & recordMask\n", New: "n := c.body & recordMask; c.chunk[0] = headOf(c.body + 1)\n",
	}, nil},
	// Tokens.
	{"attempts do not wait for each other", "dedup", overlay.Edit{
		File: "dedup/options.go", Old: "\tlock.Lock()\n\tdefer lock.Unlock()\n", New: "\t_ = lock\n",
	}, nil},
	{"the next window does not look at the tokens before it", "dedup", overlay.Edit{
		File: "dedup/tokens.go", Old: "v.past = before.tokens\n", New: "\n",
	}, nil},
	{"a token is not kept with its id", "dedup", overlay.Edit{
		File: "dedup/options.go", Old: "kind |= tokenKind\n", New: "\n",
	}, nil},
	{"a key that has no room is not looked for again", "dedup", overlay.Edit{
		File: "dedup/options.go", Old: "if k = keys.Find(hash, name); k == nil {\n\t\t\treturn nil, ErrTooManyKeys", New: "if k == nil {\n\t\t\treturn nil, ErrTooManyKeys",
	}, nil},
	{"an attempt is judged in an epoch that was left", "dedup", overlay.Edit{
		File: "dedup/options.go", Old: "case m.current.Load() != v:", New: "case false:",
	}, nil},
	{"a repeat is not looked for among the tokens", "dedup", overlay.Edit{
		File: "dedup/options.go", Old: "verdict != Unique && verdict != Turned && m.hasToken(v.tokens, it, token)", New: "false",
	}, nil},
	{"the sieves are filled while a token may be added", "dedup", overlay.Edit{
		File: "dedup/sieve.go", Old: "if m.pastSettled(v) && m.fillSieves(", New: "if m.fillSieves(",
	}, nil},
	{"the sieves are used before they are filled", "dedup", overlay.Edit{
		File: "dedup/sieve.go", Old: "if !t.sieved.Load() {", New: "if t.table.levels[0].Load() == nil {",
	}, nil},
	{"a token is not added", "dedup", overlay.Edit{
		File: "dedup/options.go", Old: "\t\t\tv.tokens.add(m, token)\n", New: "\n",
	}, nil},
	{"the head does not count the record", "dedup", overlay.Edit{
		File: "dedup/segment.go", Old: "c.chunk[0] = headOf(c.body)", New: "c.chunk[0] = headOf(c.body - 1)",
	}, nil},
	{"an id is answered before it is in the journal", "dedup", overlay.Edit{
		File: "dedup/memory.go", Old: "w := j.writers.Get().(*writer)\n\t\tdefer j.writers.Put(w)\n", New: "w := j.writers.Get().(*writer)\n\t\tj.writers.Put(w)\n",
	}, nil},
	{"a repeat is kept again", "dedup", overlay.Edit{
		File: "dedup/memory.go", Old: "case p == taken:\n\t\t\tc.append(k)", New: "case p == taken || p == found:\n\t\t\tc.append(k)",
	}, nil},
	{"a writer goes on in a full chunk", "dedup", overlay.Edit{
		File: "dedup/segment.go", Old: "c.body&recordMask == chunkRoom[kind]", New: "c.body&recordMask == chunkRoom[kind]+1",
	}, nil},
	{"a writer keeps the chunk of another epoch", "dedup", overlay.Edit{
		File: "dedup/segment.go", Old: "of.cursors = [recordKinds]cursor{}", New: "_ = cursor{}",
	}, nil},
	{"two writers get one chunk", "dedup", overlay.Edit{
		File: "dedup/segment.go", Old: "\ts.next++\n\ts.last = max(s.last, serial)\n\tif", New: "\tj.mu.Unlock(); j.mu.Lock(); s.next++\n\ts.last = max(s.last, serial)\n\tif",
	}, nil},
	{"a slot counts before it is whole", "dedup", overlay.Edit{
		File: "dedup/journal.go", Old: "store(&to.id, 0)\n", New: "store(&to.id, whole.id)\n",
	}, nil},
	{"the check of a slot is written last", "dedup", overlay.Edit{
		File: "dedup/journal.go", Old: "store(&to.check, checkOf(whole.words()))\n", New: "\n",
	}, []overlay.Edit{{File: "dedup/journal.go", Old: "store(&to.id, whole.id) // from here on the slot counts", New: "store(&to.id, whole.id); store(&to.check, checkOf(whole.words()))"}}},
	{"an epoch's segments are free before it is published", "dedup", overlay.Edit{
		File: "dedup/segment.go", Old: "k.serial > 0 && !k.ended {\n\t\t\tfloor", New: "k.serial > 0 && false {\n\t\t\tfloor",
	}, nil},
	{"the segments of the open epoch are free", "dedup", overlay.Edit{
		File: "dedup/segment.go", Old: "if s.last >= floor ||", New: "if s.last > floor ||",
	}, nil},
	{"two requests make one segment", "dedup", overlay.Edit{
		File: "dedup/segment.go", Old: "\tj.making.Lock()\n\tdefer j.making.Unlock()\n", New: "\n",
	}, nil},
	// A connection.
	{"a connection that is parked is closed", "server", overlay.Edit{
		File: "server/conn.go", Old: "if c.parking.Load() {", New: "if false {",
	}, nil},
	{"the deadline of parking stays", "server", overlay.Edit{
		File: "server/park.go", Old: "\t_ = c.raw.SetReadDeadline(time.Time{})\n\tc.nudged", New: "\tc.nudged",
	}, nil},
	{"the stop closes a connection that the fast path serves", "server", overlay.Edit{
		File: "server/conn.go", Old: "if c.serving.Load() {", New: "if false {",
	}, nil},
	{"a read of the fast path does not mark the connection as busy", "server", overlay.Edit{
		File: "server/conn.go", Old: "&phaseMask) != phaseReading {", New: "&phaseMask) == phaseNew {",
	}, nil},
	{"the deadline comes before its reason", "server", overlay.Edit{
		File: "server/conn.go", Old: "\tc.stopped.Store(true)\n\tc.interrupt()", New: "\tc.interrupt()\n\tc.stopped.Store(true)",
	}, nil},
	{"a read goes on whatever ended it", "server", overlay.Edit{
		File: "server/park.go", Old: "&& !c.stopped.Load()\n}", New: "\n}",
	}, nil},
	{"the deadline is cleared after the look at the reason", "server", overlay.Edit{
		File: "server/park.go", Old: "\t_ = c.raw.SetReadDeadline(time.Time{})\n\tc.nudged", New: "\tdefer c.raw.SetReadDeadline(time.Time{})\n\tc.nudged",
	}, nil},
	{"a parked connection waits without the deadline of the stop", "server", overlay.Edit{
		File: "server/park.go", Old: "if c.owner.stopping.Load() {", New: "if false {",
	}, nil},
	{"the stop is marked after the deadlines", "server", overlay.Edit{
		File: "server/park.go", Old: "\tl.stopping.Store(true)\n", New: "\tdefer l.stopping.Store(true)\n",
	}, nil},
	{"the deadline of parking comes before its reason", "server", overlay.Edit{
		File: "server/conn.go", Old: "!c.nudged.Swap(true):\n\t\tc.interrupt()", New: "!c.nudged.Load():\n\t\tc.interrupt()\n\t\tc.nudged.Store(true)",
	}, nil},
	{"a parked connection remembers that it was to be parked", "server", overlay.Edit{
		File: "server/park.go", Old: "\tc.nudged.Store(false)\n", New: "\n",
	}, nil},
	{"a connection is to be parked again before the deadline of the last time is cleared", "server", overlay.Edit{
		File: "server/park.go", Old: "\t_ = c.raw.SetReadDeadline(time.Time{})\n\tc.nudged.Store(false)\n", New: "\tc.nudged.Store(false)\n\t_ = c.raw.SetReadDeadline(time.Time{})\n",
	}, nil},
	{"the fast path forgets that it is done", "server", overlay.Edit{
		File: "server/fast.go", Old: "\t\tc.serving.Store(false)\n", New: "\n",
	}, nil},
	{"the fast path is not marked", "server", overlay.Edit{
		File: "server/fast.go", Old: "\t\tc.serving.Store(true)\n", New: "\n",
	}, nil},
	{"an answer is written while the connection is idle", "server", overlay.Edit{
		File: "server/conn.go", Old: "\tc.enter(phaseWriting)\n\tn, err := c.Conn.Write(p)", New: "\tc.enter(phaseIdle)\n\tn, err := c.Conn.Write(p)",
	}, nil},
	{"an answer that is never read is waited for", "server", overlay.Edit{
		File: "server/conn.go", Old: "\t\t_ = c.raw.Close() // unblocks the write: the client does not read\n", New: "\n",
	}, nil},
	// Callbacks.
	{"a callback is sent before its id is counted", "server", overlay.Edit{
		File: "server/accept.go", Old: "\tif a.wanted {\n\t\tdefer func() {", New: "\tif a.wanted {\n\t\ts.cfg.Callbacks.Send(a.endpoint)\n\t}\n\tif false {\n\t\tdefer func() {",
	}, nil},
	{"a repeat is called back, too", "server", overlay.Edit{
		File: "server/accept.go", Old: "if w.verdicts[0] == dedup.Unique {", New: "if w.verdicts[0] != dedup.Turned {",
	}, nil},
	{"the place of an id that is refused stays reserved", "server", overlay.Edit{
		File: "server/accept.go", Old: "\t\t\t} else {\n\t\t\t\ts.cfg.Callbacks.Release(a.endpoint)", New: "\t\t\t} else if w.verdicts[0] != dedup.Turned {\n\t\t\t\ts.cfg.Callbacks.Release(a.endpoint)",
	}, nil},
	{"a place is reserved while the stop waits for the last ones", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "if s.draining || s.closed {\n\t\treturn false", New: "if s.closed {\n\t\treturn false",
	}, nil},
	{"the stop does not wait for what is reserved", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "(s.closed || len(s.table) == 0)", New: "true",
	}, nil},
	{"a place is taken after the lock of the look at the bound", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "\tif d == nil {\n\t\td = s.newDestination(ep)", New: "\ts.mu.Unlock()\n\ts.mu.Lock()\n\tif d == nil {\n\t\td = s.newDestination(ep)",
	}, nil},
	{"one place more than there are", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "if len(s.table) >= s.cfg.maxWaiting {", New: "if len(s.table) > s.cfg.maxWaiting {",
	}, nil},
	{"one place more than a destination may have", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "d.entries >= s.cfg.maxWaitingPerDestination", New: "d.entries > s.cfg.maxWaitingPerDestination",
	}, nil},
	{"a second reservation of an endpoint does not count", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "\t\te.refs++\n\t\treturn true", New: "\t\treturn true",
	}, nil},
	{"a place is free although it is reserved", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "if e.refs > 0 || e.queued {", New: "if e.queued {",
	}, nil},
	{"a place is free although its POST waits", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "if e.refs > 0 || e.queued {", New: "if e.refs > 0 {",
	}, nil},
	{"a place that is released is not free", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "\te := s.table[ep.url]\n\te.refs--\n\ts.unreserve(e)", New: "\ts.table[ep.url].refs--",
	}, nil},
	{"a POST merges with one in flight", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "\tcase e.queued:\n", New: "\tcase e.queued || d.inFlight > 0:\n\t\tdefer s.unreserve(e)\n",
	}, nil},
	{"a POST waits and no worker is woken", "server/callback", overlay.Edit{
		File: "server/callback/destination.go", Old: "\td.place = s.ready[d.readyIn].PushBack(d)\n\ts.work.Signal()", New: "\td.place = s.ready[d.readyIn].PushBack(d)",
	}, nil},
	{"a worker is woken before there is a POST", "server/callback", overlay.Edit{
		File: "server/callback/destination.go", Old: "\td.state, d.readyIn = destReady, 0\n", New: "\ts.work.Signal()\n\ts.mu.Unlock()\n\ts.mu.Lock()\n\td.state, d.readyIn = destReady, 0\n",
	}, []overlay.Edit{{File: "server/callback/destination.go", Old: "\td.place = s.ready[d.readyIn].PushBack(d)\n\ts.work.Signal()", New: "\td.place = s.ready[d.readyIn].PushBack(d)"}}},
	{"the stop wakes one worker", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "s.work.Broadcast()", New: "s.work.Signal()",
	}, nil},
	{"a worker does not look whether the stop has come before it waits", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "\tfor !s.closed {\n", New: "\tfor first := true; first || !s.closed; first = false {\n",
	}, nil},
	{"a destination has one POST in flight more", "server/callback", overlay.Edit{
		File: "server/callback/destination.go", Old: "d.inFlight >= s.cfg.Concurrency", New: "d.inFlight > s.cfg.Concurrency",
	}, nil},
	{"a POST that ends does not schedule the next", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "\t\ts.failWaiting(d)\n\t}\n\ts.schedule(d)\n", New: "\t\ts.failWaiting(d)\n\t}\n",
	}, nil},
	{"the end of a POST is noticed before it is booked", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "\ts.ended(j)\n", New: "\ts.noticeEmpty()\n\ts.ended(j)\n",
	}, []overlay.Edit{{File: "server/callback/callback.go", Old: "\ts.noticeEmpty()\n\ts.mu.Unlock()\n\ts.cfg.Took", New: "\ts.mu.Unlock()\n\ts.cfg.Took"}}},
	{"a destination that becomes proven keeps its places", "server/callback", overlay.Edit{
		File: "server/callback/destination.go", Old: "\t\ts.unprovenSlots -= d.entries\n", New: "\n",
	}, nil},
	{"a worker counts for a destination that is proven meanwhile", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "\tif j.unproven {\n", New: "\tif j.dest.unproven {\n",
	}, nil},
	{"what is in flight at the stop is not waited for", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "s.stats.InFlight == 0 && s.stats.Waiting == 0", New: "s.stats.Waiting == 0",
	}, nil},
	{"a Send after the stop waits for ever", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "\tcase s.closed:\n\t\ts.stats.Ended[Dropped]++\n", New: "",
	}, nil},
	{"the stop cuts nothing off", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "\ts.mu.Unlock()\n\ts.cut()\n", New: "\ts.mu.Unlock()\n",
	}, nil},
	{"a POST is queued without the lock", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "func (s *Sender) Send(ep Endpoint) {\n\ts.mu.Lock()\n\tdefer s.mu.Unlock()", New: "func (s *Sender) Send(ep Endpoint) {",
	}, nil},
	{"the end of a POST is booked without the lock", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "\td := j.dest\n\ts.mu.Lock()\n", New: "\td := j.dest\n",
	}, []overlay.Edit{{File: "server/callback/callback.go", Old: "\ts.noticeEmpty()\n\ts.mu.Unlock()\n\ts.cfg.Took", New: "\ts.noticeEmpty()\n\ts.cfg.Took"}}},
	// The rate of a destination.
	{"a POST waits for its rate and nothing is to wake it", "server/callback", overlay.Edit{
		File: "server/callback/destination.go", Old: "\t\ttime.AfterFunc(wait, func() { s.due(d) })\n", New: "\n",
	}, nil},
	{"a POST that waits for its rate is due before that allows it", "server/callback", overlay.Edit{
		File: "server/callback/destination.go", Old: "time.AfterFunc(wait,", New: "time.AfterFunc(wait/2,",
	}, []overlay.Edit{{File: "server/callback/destination.go", Old: "\td.state = destNone\n\ts.schedule(d)\n\ts.park(d)", New: "\tif d.state = destNone; d.queue != nil {\n\t\ts.pushReady(d)\n\t}\n\ts.park(d)"}}},
	{"a POST that is due is not scheduled", "server/callback", overlay.Edit{
		File: "server/callback/destination.go", Old: "\td.state = destNone\n\ts.schedule(d)\n\ts.park(d)", New: "\td.state = destNone\n\ts.park(d)",
	}, nil},
	{"a destination that is due still waits for its rate", "server/callback", overlay.Edit{
		File: "server/callback/destination.go", Old: "\td.state = destNone\n\ts.schedule(d)\n\ts.park(d)", New: "\ts.schedule(d)\n\ts.park(d)",
	}, nil},
	{"idle time is saved for the rate", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "next.Before(earliest) {", New: "false {",
	}, nil},
	{"a POST does not count for the rate", "server/callback", overlay.Edit{
		File: "server/callback/callback.go", Old: "\t\t\td.next = s.cfg.after(d.next, time.Now())\n", New: "\n",
	}, nil},
}
