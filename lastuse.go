package main

import (
	"encoding/json"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/rs/zerolog"

	"verve/internal/durable"
)

// lastUse records where the ids of a data directory are counted: in memory, or in the Redis of
// a group. If that changes during a window, the ids that were answered before the change are
// not known after it, so the record of that window is not exact.
type lastUse struct {
	Ids   string    `json:"ids"` // as config.ids returns it
	Until time.Time `json:"until,omitzero"`

	path string // empty: nothing is on disk
}

const lastUseFile = "last-use.json"

// ids returns a text that names the place where ids are counted, without the secrets in its
// URLs.
func (c *config) ids() string {
	if c.Dedup != dedupRedis {
		return c.Dedup
	}
	var hosts []string
	for _, text := range c.RedisURL {
		if u, err := url.Parse(text); err == nil { // there is no error: the URLs were checked
			hosts = append(hosts, u.Host+u.Path)
		}
	}
	slices.Sort(hosts)
	return "group " + c.Group + " in Redis at " + strings.Join(hosts, ", ")
}

// begin records that ids are counted at the place named ids from now on. It returns until when
// they were counted elsewhere; the zero time if they were not, or if that is not known.
func (u *lastUse) begin(dir, ids string, log zerolog.Logger) (elsewhere time.Time) {
	if dir == noDataDir {
		return elsewhere
	}
	u.path = filepath.Join(dir, lastUseFile)
	var before lastUse
	if b, err := os.ReadFile(u.path); err == nil && json.Unmarshal(b, &before) == nil && before.Ids != ids {
		if elsewhere = before.Until; elsewhere.IsZero() {
			elsewhere = time.Now() // that process was killed, at an unknown time
		}
		log.Warn().Str("before", before.Ids).Str("now", ids).Bool("killed", before.Until.IsZero()).
			Msg("ids of this data directory were counted elsewhere before: windows left in a group's Redis are published by the next instance of that group, and a window that was running then is not exact")
	}
	u.Ids, u.Until = ids, time.Time{}
	if err := u.write(); err != nil {
		log.Warn().Err(err).Msg("a later change of --dedup, --group or --redis-url within a window would not be noticed")
	}
	return elsewhere
}

// end records that no id is counted any more.
func (u *lastUse) end() error {
	u.Until = time.Now().UTC()
	return u.write()
}

func (u *lastUse) write() error {
	if u.path == "" {
		return nil
	}
	b, err := json.Marshal(u)
	if err != nil {
		return err
	}
	return durable.ReplaceFile(u.path, append(b, '\n'), 0o644)
}
