package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"verve/internal/setting"
)

// certificatePoll is how often the files of a certificate are read. Reading them
// notices every way of replacing a file; watching their names does not (a mounted
// secret is a link to a link).
const certificatePoll = 5 * time.Second

// Certificate is a TLS certificate with its key, from files that Run reads again
// every certificatePoll. It is safe for concurrent use; Run is called once.
type Certificate struct {
	certFile, keyFile string
	log               zerolog.Logger
	poll              time.Duration

	current   atomic.Pointer[tls.Certificate]
	cert, key []byte        // what was last read from the files; only load uses them
	failures  atomic.Uint64 // changed files that could not be used
}

// LoadCertificate reads a certificate, with its chain, and its key, both in PEM. It returns an
// error if a file cannot be read or the two do not fit together.
func LoadCertificate(certFile, keyFile string, log zerolog.Logger) (*Certificate, error) {
	c := &Certificate{certFile: certFile, keyFile: keyFile, log: log, poll: certificatePoll}
	_, err := c.load()
	return c, err
}

// load reads the files, and reports whether it took over a new pair from them.
func (c *Certificate) load() (changed bool, err error) {
	cert, err := setting.ReadFile(c.certFile)
	if err != nil {
		return false, err
	}
	key, err := setting.ReadFile(c.keyFile)
	if err != nil {
		return false, err
	}
	if c.current.Load() != nil && bytes.Equal(cert, c.cert) && bytes.Equal(key, c.key) {
		return false, nil
	}
	c.cert, c.key = cert, key
	pair, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return false, fmt.Errorf("%s and %s: %w", c.certFile, c.keyFile, err)
	}
	if time.Now().After(pair.Leaf.NotAfter) {
		c.log.Warn().Time("not_after", pair.Leaf.NotAfter).Str("file", c.certFile).Msg("the TLS certificate has expired")
	}
	c.current.Store(&pair)
	return true, nil
}

// Run takes over new files until ctx ends, and then returns nil. If the files cannot be
// used, such as a new certificate whose key is not written yet, it logs that once, and
// the old pair stays.
func (c *Certificate) Run(ctx context.Context) error {
	var last string
	every(c.poll, ctx.Done(), func() {
		changed, err := c.load()
		switch {
		case err != nil && err.Error() != last:
			last = err.Error()
			c.failures.Add(1)
			c.log.Error().Err(err).Msg("the new TLS certificate cannot be used; the previous one stays")
		case changed:
			last = ""
			c.log.Info().Str("file", c.certFile).Time("not_after", c.current.Load().Leaf.NotAfter).Msg("new TLS certificate")
		}
	})
	return nil
}

// notAfter is when the certificate in use expires.
func (c *Certificate) notAfter() time.Time { return c.current.Load().Leaf.NotAfter }

func (c *Certificate) serverConfig() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return c.current.Load(), nil
		},
	}
}

// OwnConfig returns the configuration for connections to this server itself, by its
// address. The certificate may have any names, but it must be the one that is served
// here, now or when OwnConfig was called.
func (c *Certificate) OwnConfig() *tls.Config {
	before := c.current.Load()
	return &tls.Config{
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: true, // compared below, byte by byte
		VerifyConnection: func(state tls.ConnectionState) error {
			got := state.PeerCertificates[0].Raw
			if bytes.Equal(got, before.Leaf.Raw) || bytes.Equal(got, c.current.Load().Leaf.Raw) {
				return nil
			}
			return fmt.Errorf("own listener: another certificate than %s", c.certFile)
		},
	}
}
