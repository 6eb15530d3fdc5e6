package server

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"verve/internal/testproc"
	"verve/server/callback"
)

// newKeyPair makes a certificate for a name, signed by itself, and its key.
func newKeyPair(t testing.TB, name string) (cert, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}

// keyFiles are a certificate and a key on disk.
type keyFiles struct {
	t         testing.TB
	cert, key string
}

func newKeyFiles(t testing.TB) keyFiles {
	dir := t.TempDir()
	return keyFiles{t, filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")}
}

// replace writes a file as certificate managers do: whole or not at all.
func (f keyFiles) replace(path string, content []byte) {
	f.t.Helper()
	if err := os.WriteFile(path+".new", content, 0o600); err != nil {
		f.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		f.t.Fatal(err)
	}
}

func (f keyFiles) load(log zerolog.Logger) *Certificate {
	f.t.Helper()
	cert, err := LoadCertificate(f.cert, f.key, log)
	if err != nil {
		f.t.Fatal(err)
	}
	return cert
}

// newTLSSite is a site whose public listener speaks TLS.
func newTLSSite(t testing.TB, change func(*Config)) *site {
	t.Helper()
	files := newKeyFiles(t)
	cert, key := newKeyPair(t, "verve.example.com")
	files.replace(files.cert, cert)
	files.replace(files.key, key)
	return newSite(t, func(c *Config) {
		c.TLS = files.load(zerolog.Nop())
		if change != nil {
			change(c)
		}
	})
}

// trusting is the configuration of a client that knows the certificate.
func (s *site) trusting() *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(s.cfg.TLS.current.Load().Leaf)
	return &tls.Config{RootCAs: roots, ServerName: "verve.example.com", MinVersion: tls.VersionTLS12}
}

func (s *site) dialTLS() (net.Conn, *bufio.Reader) {
	s.t.Helper()
	raw, _ := s.dial()
	c := tls.Client(raw, s.trusting())
	return c, bufio.NewReader(c)
}

func TestTLSAnswersPipelinedRequestsInOrder(t *testing.T) {
	s := newTLSSite(t, nil)
	c, r := s.dialTLS()
	for round := range 3 {
		var batch bytes.Buffer
		for i := range 50 {
			batch.WriteString(get(fmt.Sprintf("id=%d", round*30+i)))
		}
		if _, err := c.Write(batch.Bytes()); err != nil {
			t.Fatal(err)
		}
		for i := range 50 {
			want := 200
			if round > 0 && i < 20 {
				want = 409
			}
			if resp, _, err := answer(r); err != nil || resp.StatusCode != want {
				t.Fatalf("round %d, request %d: got %v, %v, want %d", round, i, resp, err, want)
			}
		}
	}
	if state := c.(*tls.Conn).ConnectionState(); state.NegotiatedProtocol == "h2" {
		t.Error("HTTP/2 was negotiated")
	}
}

func TestTLSSlowIdleAndSilentConnectionsAreEnded(t *testing.T) {
	t.Parallel()
	s := newTLSSite(t, func(c *Config) {
		c.SlowTimeout, c.IdleTimeout = seldomSlow, seldomSlow
	})
	_, silent := s.dial() // no handshake at all
	half, halfway := s.dial()
	half.Write([]byte("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")) // the beginning of one
	slow, dripping := s.dialTLS()
	if _, err := io.WriteString(slow, "GET /api/verve/accept?id=1 HTT"); err != nil {
		t.Fatal(err)
	}
	used, idle := s.dialTLS()
	io.WriteString(used, get("id=2"))
	if resp, _, err := answer(idle); err != nil || resp.StatusCode != 200 {
		t.Fatalf("got %v, %v", resp, err)
	}
	for _, r := range []*bufio.Reader{silent, halfway} {
		if b, err := io.ReadAll(r); err != nil || bytes.Contains(b, []byte("HTTP")) {
			t.Errorf("before the handshake: got %q, %v", b, err)
		}
	}
	if b, err := io.ReadAll(dripping); err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 408") {
		t.Errorf("slow: got %q, %v", b, err)
	}
	// An encrypted connection ends with a notification (close_notify).
	if b, err := io.ReadAll(idle); err != nil || len(b) > 0 {
		t.Errorf("idle: got %q, %v", b, err)
	}
	if n := s.cfg.Counter.Stats().Unique; n != 1 {
		t.Errorf("%d ids counted, want 1", n)
	}
	if s.ln.slowClosed.Load() != 3 || s.ln.idleClosed.Load() != 1 || s.ln.badHandshakes.Load() != 2 {
		t.Errorf("ended %d slow, %d idle, %d without a handshake, want 3, 1, 2",
			s.ln.slowClosed.Load(), s.ln.idleClosed.Load(), s.ln.badHandshakes.Load())
	}
}

func TestTLSClientThatDoesNotReadIsEnded(t *testing.T) {
	t.Parallel()
	s := newTLSSite(t, func(c *Config) { c.SlowTimeout = 300 * time.Millisecond })
	raw, _ := s.dial()
	raw.(*net.TCPConn).SetReadBuffer(4096)
	c := tls.Client(raw, s.trusting())
	batch := []byte(strings.Repeat(get("id="), 1000))
	for {
		if _, err := c.Write(batch); err != nil {
			break // reset by the server, or the deadline of dial
		}
	}
	if s.ln.slowClosed.Load() != 1 {
		t.Error("the connection was not ended by the server")
	}
}

func TestTLSLimitsHold(t *testing.T) {
	s := newTLSSite(t, func(c *Config) { c.MaxConns = 1 })
	c, r := s.dialTLS()
	io.WriteString(c, get("id=1"))
	if resp, _, err := answer(r); err != nil || resp.StatusCode != 200 {
		t.Fatalf("got %v, %v", resp, err)
	}
	over, _ := s.dialTLS()
	if err := over.(*tls.Conn).Handshake(); err == nil {
		t.Error("a connection over the limit was taken")
	}
	if s.ln.rejected.Load() != 1 {
		t.Errorf("%d rejected, want 1", s.ln.rejected.Load())
	}
}

func TestPlainHTTPOnTheTLSPortIsTold(t *testing.T) {
	s := newTLSSite(t, nil)
	resp, body := s.ask(get("id=1"))
	if resp.StatusCode != 400 || body != "failed" || resp.Header.Get("Verve-Reason") != "bad-request" || !resp.Close {
		t.Errorf("got %v %q", resp, body)
	}
}

func TestTLSStopAnswersWhatItCounted(t *testing.T) {
	t.Parallel()
	s := newTLSSite(t, nil)
	const clients, depth = 4, 8
	var mu sync.Mutex
	var told uint64
	var loading, started sync.WaitGroup
	started.Add(clients)
	for i := range clients {
		c, r := s.dialTLS()
		loading.Go(func() {
			begun := sync.OnceFunc(started.Done)
			for n := 0; ; n++ {
				for d := range depth {
					io.WriteString(c, get(fmt.Sprintf("id=%d-%d-%d", i, n, d)))
				}
				for range depth {
					resp, _, err := answer(r)
					if err != nil {
						return
					}
					if resp.StatusCode == 200 {
						mu.Lock()
						told++
						mu.Unlock()
					}
					begun()
					if resp.Close {
						return
					}
				}
			}
		})
	}
	started.Wait()
	s.stop()
	loading.Wait()
	if got := s.records.sum(); got != told {
		t.Errorf("records say %d, clients were told %d", got, told)
	}
}

// TestCallbackReachesOwnSinkOverTLS: the own listener is known by its
// certificate, whatever name that has; plain URLs for it are refused.
func TestCallbackReachesOwnSinkOverTLS(t *testing.T) {
	s := newTLSSite(t, nil)
	if resp, _ := s.askTLS(get("id=1&endpoint=https%3A%2F%2F" + s.addr + "%2Ftest")); resp.StatusCode != 200 {
		t.Fatalf("got %v", resp)
	}
	awaitCallbacks(t, s.cfg.Callbacks, func(st callback.Stats) bool { return st.Ended[callback.Delivered] == 1 })
	if s.sunk.Load() != 1 {
		t.Errorf("/test received %d POSTs, want 1", s.sunk.Load())
	}
	for _, url := range []string{"http://" + s.addr + "/test", "https://" + s.addr + "/", "https://" + s.addr + "/api/verve/accept?id=1"} {
		if _, err := s.cfg.Callbacks.Parse([]byte(url)); err == nil {
			t.Errorf("%s is allowed", url)
		}
	}
	// Somebody else on the own address, as after a restart on another port.
	files := newKeyFiles(t)
	cert, key := newKeyPair(t, "verve.example.com")
	files.replace(files.cert, cert)
	files.replace(files.key, key)
	conn, err := tls.Dial("tcp", s.addr, files.load(zerolog.Nop()).OwnConfig())
	if err == nil {
		conn.Close()
		t.Error("a stranger's certificate was taken for the own")
	}
}

func (s *site) askTLS(raw string) (resp *http.Response, body string) {
	s.t.Helper()
	c, r := s.dialTLS()
	defer c.Close()
	if _, err := io.WriteString(c, raw); err != nil {
		s.t.Fatal(err)
	}
	resp, body, err := answer(r)
	if err != nil {
		s.t.Fatalf("%.100q: %v", raw, err)
	}
	return resp, body
}

// TestCertificateIsReplacedWhenTheFilesChange: connections go on, new ones get
// the new certificate; a pair that does not fit is logged once and not taken.
func TestCertificateIsReplacedWhenTheFilesChange(t *testing.T) {
	files := newKeyFiles(t)
	cert, key := newKeyPair(t, "verve.example.com")
	files.replace(files.cert, cert)
	files.replace(files.key, key)
	var log testproc.Buffer
	var certificate *Certificate
	s := newSite(t, func(c *Config) {
		certificate = files.load(zerolog.New(&log))
		certificate.poll = time.Millisecond
		c.TLS = certificate
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); certificate.Run(ctx) }()
	defer func() { cancel(); <-done }()
	logged := func(part string) {
		t.Helper()
		for start := time.Now(); !strings.Contains(log.String(), part); time.Sleep(time.Millisecond) {
			if time.Since(start) > patience {
				t.Fatalf("no %q in the log:\n%s", part, log.String())
			}
		}
	}
	first := certificate.current.Load()
	old, r := s.dialTLS()
	io.WriteString(old, get("id=1"))
	if resp, _, err := answer(r); err != nil || resp.StatusCode != 200 {
		t.Fatalf("got %v, %v", resp, err)
	}

	newCert, newKey := newKeyPair(t, "verve.example.com")
	files.replace(files.cert, newCert) // its key is still to come
	logged("private key does not match")
	if certificate.current.Load() != first {
		t.Fatal("half a pair was taken")
	}
	if resp, _ := s.askTLS(get("id=2")); resp.StatusCode != 200 {
		t.Fatalf("got %v", resp)
	}
	files.replace(files.key, newKey)
	logged(`"message":"new TLS certificate"`)
	if resp, _ := s.askTLS(get("id=3")); resp.StatusCode != 200 { // trusts the new one only
		t.Fatalf("got %v", resp)
	}
	io.WriteString(old, get("id=4"))
	if resp, _, err := answer(r); err != nil || resp.StatusCode != 200 {
		t.Fatalf("the connection of before: got %v, %v", resp, err)
	}

	second := certificate.current.Load()
	if err := os.Remove(files.key); err != nil {
		t.Fatal(err)
	}
	logged("no such file")
	for _, garbage := range []string{"", "not PEM", string(newKey)} {
		files.replace(files.cert, []byte(garbage))
		files.replace(files.key, newKey)
		logged("failed to find")
	}
	if certificate.current.Load() != second {
		t.Error("garbage was taken for a certificate")
	}
	cancel()
	<-done
	if n := strings.Count(log.String(), "private key does not match"); n != 1 {
		t.Errorf("the same problem was logged %d times, want once", n)
	}
	if strings.Contains(log.String(), "PRIVATE") {
		t.Error("the log holds a key")
	}
}

func TestBadKeyFilesStopTheStart(t *testing.T) {
	files := newKeyFiles(t)
	cert, _ := newKeyPair(t, "a.example.com")
	_, key := newKeyPair(t, "a.example.com")
	files.replace(files.cert, cert)
	if _, err := LoadCertificate(files.cert, files.key, zerolog.Nop()); err == nil {
		t.Error("a missing key was taken")
	}
	files.replace(files.cert, nil)
	files.replace(files.key, nil)
	if _, err := LoadCertificate(files.cert, files.key, zerolog.Nop()); err == nil || !strings.Contains(err.Error(), files.cert) {
		t.Errorf("two empty files: %v, want an error that names them", err)
	}
	files.replace(files.cert, cert)
	files.replace(files.key, key)
	if _, err := LoadCertificate(files.cert, files.key, zerolog.Nop()); err == nil || !strings.Contains(err.Error(), files.key) {
		t.Errorf("another's key: %v, want an error that names the files", err)
	}
}
