package redis

import (
	"verve/counter"
	"verve/dedup"
)

// tokenBytes is about how many bytes a token takes in the memory of an instance.
const tokenBytes = 40

// rememberToken keeps the token of an id that was answered as new, so that a retry is
// recognised while Redis is unreachable. Without fail open every retry is refused then, so
// nothing is kept. The lane's mu is held.
func (le *laneEpoch) rememberToken(r *Set, m *named) {
	if !r.cfg.FailOpen || !m.hasToken() || le.retired || !le.log.room(r) {
		return
	}
	if le.tokens == nil {
		le.tokens = map[token]struct{}{}
	}
	if _, there := le.tokens[m.token]; !there {
		le.tokens[m.token] = struct{}{}
		r.logBytes.Add(tokenBytes)
	}
}

// recognise looks for the token among the answers of this process, in s and the window
// before it. The mu of the lane is held.
func (s *redisEpoch) recognise(lane int, m *named) (dedup.Verdict, bool) {
	if !m.hasToken() {
		return 0, false
	}
	if _, there := s.lanes[lane].tokens[m.token]; there {
		return dedup.Replayed, true
	}
	if before := s.previous.Load(); before != nil && before.name == s.before {
		if _, there := before.lanes[lane].tokens[m.token]; there {
			return dedup.ReplayedBefore, true
		}
	}
	return 0, false
}

// again returns the verdict on a request, which named m, for an id that was answered as new,
// without Redis, to a request that named first. The mu of the lane is held.
func (s *redisEpoch) again(lane int, first, m *named) dedup.Verdict {
	if v, known := s.recognise(lane, m); known {
		return v
	}
	if m.hasToken() && sameAttempt(first, m) {
		return dedup.Replayed
	}
	return dedup.Repeat
}

// countUnder counts an id that was answered as new under its key. This instance only shows
// that count: the record has the counts of Redis.
func (r *Set) countUnder(e *counter.Epoch, m *named) {
	if m != nil && m.under != "" {
		name := []byte(m.under)
		e.Keys().CountLate(r.keyHash(name), name)
	}
}

// hasRoom reports whether a new id may be counted under a key. All keys that this instance has
// counted are in Redis: if there is no room here for another one, there is none there. An id
// with a token is sent nevertheless: a retry from the window before needs no room.
func (r *Set) hasRoom(e *counter.Epoch, under []byte) bool {
	return len(under) == 0 || !e.Keys().Full() || e.Keys().Find(r.keyHash(under), under) != nil
}
