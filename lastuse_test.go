package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

// TestLastUse: after a change of the place where ids are counted, it is known until when they
// were counted elsewhere, also to the processes after the next one. It is known that a process that
// was killed counted in the data directory.
func TestLastUse(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, lastUseFile)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	killed := false
	var ended, last time.Time // when the process before ended, if it was not killed; what it got
	before := ""
	for i, tt := range []struct {
		ids    string
		change bool
		before func() error
		killed bool // the process was killed at its end
	}{
		{ids: "memory"},
		{ids: "memory", killed: true},
		{ids: "memory"},
		{ids: "group a", change: true},
		{ids: "group a", killed: true},
		{ids: "group b", change: true, killed: true},
		{ids: "group b"},
		{ids: "group b", killed: true},
		{ids: "memory", change: true, killed: true},
		// No room for a second file: this one is written in its place.
		{ids: "group a", change: true, killed: true, before: func() error { return os.Mkdir(path+".tmp", 0o755) }},
		{ids: "group a", killed: true, before: func() error { return os.Remove(path + ".tmp") }},
		// No room for this one either has left it empty.
		{ids: "group a", change: true, killed: true, before: func() error { return os.Truncate(path, 0) }},
		{ids: "group a", killed: true},
	} {
		if tt.before != nil {
			must(tt.before())
		}
		var u lastUse
		started := time.Now()
		u.read(dir, tt.ids, zerolog.Nop())
		u.begin(zerolog.Nop())
		until := u.Elsewhere
		switch {
		case !tt.change && !until.Equal(last):
			t.Errorf("process %d: elsewhere until %v, want %v as before", i, until, last)
		case tt.change && killed && until.Before(started), tt.change && !killed && until.After(ended), tt.change && until.IsZero():
			t.Errorf("process %d: elsewhere until %v; it started at %v, the one before ended at %v (killed: %t)", i, until, started, ended, killed)
		}
		if u.ran.IsZero() == (before == dedupMemory && killed) {
			t.Errorf("process %d: a killed process counted in the data directory since %v; the one before counted in %q (killed: %t)", i, u.ran, before, killed)
		}
		last, before = until, tt.ids
		if killed = tt.killed; killed {
			continue
		}
		must(u.end())
		ended = time.Now()
	}
}

// TestPlaceOfIdsHasNoSecret: and the text does not depend on the order of the URLs.
func TestPlaceOfIdsHasNoSecret(t *testing.T) {
	c := config{Dedup: dedupRedis, Group: "g", RedisURL: []string{"rediss://u:hidden@h2:1/0", "redis://h1:2"}}
	if got, want := c.ids(), "group g in Redis at h1:2, h2:1/0"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if strings.Contains(c.ids(), "hidden") {
		t.Error("it has a password")
	}
}
