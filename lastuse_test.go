package main

import (
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

// TestLastUse: after a change of the place where ids are counted, begin returns until when they
// were counted elsewhere; without a change it returns the zero time.
func TestLastUse(t *testing.T) {
	dir := t.TempDir()
	killed := false
	var ended time.Time // when the process before ended, if it was not killed
	for i, tt := range []struct {
		ids    string
		change bool
		killed bool // the process was killed at its end
	}{
		{ids: "memory"},
		{ids: "memory"},
		{ids: "group a", change: true},
		{ids: "group a", killed: true},
		{ids: "group b", change: true, killed: true},
		{ids: "group b"},
		{ids: "memory", change: true},
	} {
		var u lastUse
		started := time.Now()
		until := u.begin(dir, tt.ids, zerolog.Nop())
		switch {
		case until.IsZero() == tt.change:
			t.Errorf("process %d: elsewhere until %v, want a time: %t", i, until, tt.change)
		case tt.change && killed && until.Before(started), tt.change && !killed && until.After(ended):
			t.Errorf("process %d: elsewhere until %v; it started at %v, the one before ended at %v (killed: %t)", i, until, started, ended, killed)
		}
		if killed = tt.killed; killed {
			continue
		}
		if err := u.end(); err != nil {
			t.Fatal(err)
		}
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
