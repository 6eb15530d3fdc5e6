package redis

import (
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/redis/rueidis"

	"verve/dedup"
)

//go:embed function.lua
var redisLua string

// The same code is a function where the server takes functions, and else a
// script. The name follows from the code, so that versions do not meet.
var (
	functionName = func() string {
		sum := sha256.Sum256([]byte(redisLua))
		return "verve_" + hex.EncodeToString(sum[:6])
	}()
	functionLibrary = "#!lua name=" + functionName + "\n" + redisLua +
		"\nredis.register_function('" + functionName + "', add)\n" +
		"redis.register_function{function_name='" + freeFunction + "', callback=free, flags={'allow-oom'}}\n"
	addScript  = rueidis.NewLuaScript(redisLua + "\nreturn add(KEYS, ARGV)\n")
	freeScript = rueidis.NewLuaScript(redisLua + "\nreturn free(KEYS, ARGV)\n")
)

// freeFunction is the function, or the script, for what must work while Redis is full.
var freeFunction = functionName + "_free"

// opBatch is the operation of function.lua that ids are sent by.
const opBatch = "batch"

// Statuses of a reply.
const (
	statusOK      = "ok"
	statusNew     = "new"     // ok, as a reply that is one number: all ids are new, in the generation that was named
	statusSealed  = "sealed"  // the epoch is
	statusGap     = "gap"     // writes of this session are missing
	statusOld     = "old"     // a later batch of this session is there
	statusLost    = "lost"    // the epoch was begun again since
	statusHold    = "hold"    // others are adding again what was lost
	statusMissing = "missing" // keys are gone or on the move
	statusLacks   = "lacks"   // the user may not run commands that are needed
)

// reply is what function.lua returns.
type reply struct {
	status string
	codes  string
	gen    string
	n      uint64 // ids of the epoch in this lane; the last sequence where status is gap, lost or old

	sealed   sealedIDs // of a seal
	replicas bool      // of a seal: the master has some, or had
}

// errRefused is the error of a call that has certainly done nothing. After any other error
// that is not known.
type errRefused struct{ err error }

func (e errRefused) Error() string { return e.err.Error() }
func (e errRefused) Unwrap() error { return e.err }

// call runs an operation of function.lua on a lane.
func (r *Set) call(ctx context.Context, key string, args ...string) (reply, error) {
	c, err := r.conn()
	if err != nil {
		return reply{}, errRefused{err}
	}
	function, script := freeFunction, freeScript
	if args[0] == opBatch && (args[3] == modeAdd || args[3] == modeReplay || args[3] == modeLocal) {
		function, script = functionName, addScript
	}
	for attempt := 0; ; attempt++ {
		var res rueidis.RedisResult
		if r.script.Load() {
			res = script.Exec(ctx, c, []string{key}, args)
		} else {
			res = c.Do(ctx, c.B().Fcall().Function(function).Numkeys(1).Key(key).Arg(args...).Build())
		}
		m, err := res.ToMessage()
		if err == nil {
			return parseReply(m)
		}
		if !isRefusal(err) {
			return reply{}, err
		}
		if denied := deniedCommand.FindStringSubmatch(err.Error()); denied != nil && denied[1] == "fcall" && !r.script.Load() {
			r.useScripts(err)
			continue
		}
		// Loaded for the first time, or lost with FLUSHALL, a restart, or a node
		// that is new to the cluster.
		if attempt == 0 && !r.script.Load() && functionMissing(err) {
			if err := r.load(ctx, c); err != nil {
				return reply{}, errRefused{err}
			}
			continue
		}
		return reply{}, errRefused{err}
	}
}

// isRefusal reports whether an error is a reply of Redis.
func isRefusal(err error) bool {
	_, ok := errors.AsType[*rueidis.RedisError](err)
	return ok
}

func functionMissing(err error) bool {
	s := strings.ToLower(err.Error())
	return strings.Contains(s, "function not found") || strings.Contains(s, "unknown command") || strings.HasPrefix(s, "noperm")
}

// load loads the functions on every server, or switches to scripts if they are refused.
func (r *Set) load(ctx context.Context, c rueidis.Client) error {
	loaded := false
	var last error
	for _, node := range c.Nodes() {
		err := node.Do(ctx, node.B().FunctionLoad().Replace().FunctionCode(functionLibrary).Build()).Error()
		switch {
		case err == nil:
			loaded = true
		case isRefusal(err) && (strings.Contains(err.Error(), "unknown command") || strings.HasPrefix(err.Error(), "NOPERM")):
			r.useScripts(err)
			return nil
		default: // perhaps a replica, which gets them from its master
			last = err
		}
	}
	if loaded {
		return nil
	}
	return fmt.Errorf("loading the functions: %w", cmp.Or(last, dedup.ErrUnavailable))
}

// useScripts has scripts take the place of functions.
func (r *Set) useScripts(why error) {
	if !r.script.Swap(true) {
		reason, _, _ := strings.Cut(why.Error(), "\n")
		r.cfg.Log.Info().Msg("this Redis refuses functions (" + reason + "): scripts are used instead")
	}
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
