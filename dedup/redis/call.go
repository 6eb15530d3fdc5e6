package redis

import (
	"context"
	_ "embed"
	"errors"
	"fmt"

	"github.com/redis/rueidis"
)

//go:embed lane.lua
var laneLua string

// laneScript has the operations of an instance on a lane: see the end of lane.lua.
var laneScript = rueidis.NewLuaScript(laneLua)

// Statuses of a reply.
const (
	statusOK      = "ok"
	statusNew     = "new"     // ok, for a reply that is one number: all ids are new, in the generation that the batch named
	statusSealed  = "sealed"  // the epoch is sealed
	statusGap     = "gap"     // writes of this session are missing
	statusOld     = "old"     // Redis has a later batch of this session
	statusLost    = "lost"    // the epoch is not of the generation that the batch named: it was lost
	statusFrozen  = "frozen"  // others are adding again what was lost
	statusMissing = "missing" // keys are gone or on the move
	statusLacks   = "lacks"   // the user may not run commands that are needed
)

// reply is what lane.lua returns.
type reply struct {
	status string
	codes  string
	gen    string
	n      uint64 // ids of the epoch in this lane; if status is gap, lost or old: the last sequence number that Redis has

	sealed   sealedIDs // of a seal
	replicas bool      // of a seal: the master has some, or had
}

// errRefused is the error of a call that has certainly done nothing. After any other error
// the call may have been done.
type errRefused struct{ err error }

func (e errRefused) Error() string { return e.err.Error() }
func (e errRefused) Unwrap() error { return e.err }

// call runs an operation of lane.lua on a lane. An errRefused means that nothing was done.
func (r *Set) call(ctx context.Context, redisKey string, args ...string) (reply, error) {
	c, err := r.conn()
	if err != nil {
		return reply{}, errRefused{err}
	}
	m, err := laneScript.Exec(ctx, c, []string{redisKey}, args).ToMessage()
	if err == nil {
		return parseReply(m)
	}
	if isRefusal(err) {
		err = errRefused{err}
	}
	return reply{}, err
}

// isRefusal reports whether an error is a reply of Redis.
func isRefusal(err error) bool {
	_, ok := errors.AsType[*rueidis.RedisError](err)
	return ok
}

func parseReply(m rueidis.RedisMessage) (a reply, err error) {
	if m.IsInt64() {
		a.n, err = m.AsUint64()
		a.status = statusNew
		return a, err
	}
	parts, err := m.ToArray()
	if err != nil || len(parts) == 0 {
		return a, fmt.Errorf("unexpected reply: %w", err)
	}
	words, _ := m.AsStrSlice() // numbers are empty
	a.status = words[0]
	switch {
	case a.status == statusSealed && len(parts) == 7:
		var n [6]uint64
		for i := range n {
			if n[i], err = parts[1+i].AsUint64(); err != nil {
				return a, err
			}
		}
		a.sealed = sealedIDs{unique: n[0], exact: n[1] == 1, whole: n[2] == 1, under: n[3], unanswered: n[5] == 1}
		a.replicas = n[4] == 1
	case len(parts) == 4:
		a.codes, a.gen = words[1], words[2]
		a.n, err = parts[3].AsUint64()
	}
	return a, err
}
