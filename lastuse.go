package main

import (
	"encoding/json"
	"errors"
	"io/fs"
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
	Ids       string    `json:"ids"` // as config.ids returns it
	Until     time.Time `json:"until,omitzero"`
	Elsewhere time.Time `json:"elsewhere,omitzero"` // until when they were counted in another place before

	path string    // empty: nothing is on disk
	ran  time.Time // when the last process began to count in this directory, if it was killed; zero otherwise
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

// read finds out until when ids were counted elsewhere than at the place named ids, also if an
// earlier process recorded that and was killed; the zero time if they were not.
func (u *lastUse) read(dir, ids string, log zerolog.Logger) {
	if dir == noDataDir {
		return
	}
	u.path = filepath.Join(dir, lastUseFile)
	before := lastUse{Ids: "unknown"} // the file is empty or damaged
	b, err := os.ReadFile(u.path)
	if err == nil {
		err = json.Unmarshal(b, &before)
	}
	elsewhere := before.Elsewhere
	if before.Ids != ids && !errors.Is(err, fs.ErrNotExist) {
		if elsewhere = before.Until; elsewhere.IsZero() {
			elsewhere = time.Now() // that process was killed, at an unknown time
		}
		log.Warn().Str("before", before.Ids).Str("now", ids).Bool("killed", before.Until.IsZero()).
			Msg("ids of this data directory were counted elsewhere before: windows left in a group's Redis are published by the next instance of that group, and a window that was running then is not exact")
	}
	if info, err := os.Stat(u.path); err == nil && before.Ids == dedupMemory && before.Until.IsZero() {
		u.ran = info.ModTime() // its begin wrote the file then
	}
	u.Ids, u.Until, u.Elsewhere = ids, time.Time{}, elsewhere
}

// begin records that ids are counted from now on, at the place that read was called with. In
// memory mode the first epoch is in the journal by then: if a later start finds a journal without
// an epoch, it was lost.
func (u *lastUse) begin(log zerolog.Logger) {
	if err := u.write(); err != nil {
		log.Warn().Err(err).Msg("a later change of --dedup, --group or --redis-url within a window may not be noticed")
	}
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
	b = append(b, '\n')
	err = durable.ReplaceFile(u.path, b, 0o644)
	if err != nil {
		// Where there is no room for a second file there may be for this one. If not, it is
		// left empty, and the next start does not take an older one for the last.
		err = os.WriteFile(u.path, b, 0o644)
	}
	return err
}
