package callback

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"hash"
	"strconv"
	"time"
)

// minSecret is the shortest webhook secret taken, in bytes: the lower end of
// what the Standard Webhooks specification asks for.
const minSecret = 24

// parseSecret returns the key in a webhook secret: what follows "whsec_",
// decoded, or the bytes as they are. Space around it is what text editors
// leave at the end of a file. Errors do not quote the secret.
func parseSecret(secret []byte) ([]byte, error) {
	secret = bytes.TrimSpace(secret)
	key := secret
	if encoded, ok := bytes.CutPrefix(secret, []byte("whsec_")); ok {
		key = make([]byte, base64.StdEncoding.DecodedLen(len(encoded)))
		n, err := base64.StdEncoding.Strict().Decode(key, encoded)
		if err != nil {
			return nil, errors.New("not base64 after whsec_")
		}
		key = key[:n]
	}
	if len(key) < minSecret {
		return nil, fmt.Errorf("%d bytes, need %d", len(key), minSecret)
	}
	return bytes.Clone(key), nil
}

// signer signs webhooks by the Standard Webhooks scheme, version 1: HMAC-SHA256
// over "id.timestamp.body". One goroutine at a time uses it.
type signer struct {
	mac hash.Hash
	buf []byte
}

func newSigner(key []byte) *signer { return &signer{mac: hmac.New(sha256.New, key)} }

// signature returns the value of webhook-signature. It is valid until the
// next call.
func (s *signer) signature(id string, timestamp int64, body []byte) []byte {
	s.mac.Reset()
	s.buf = append(s.buf[:0], id...)
	s.buf = append(s.buf, '.')
	s.buf = strconv.AppendInt(s.buf, timestamp, 10)
	s.buf = append(s.buf, '.')
	s.mac.Write(s.buf)
	s.mac.Write(body)
	var sum [sha256.Size]byte
	s.buf = append(s.buf[:0], "v1,"...)
	s.buf = base64.StdEncoding.AppendEncode(s.buf, s.mac.Sum(sum[:0]))
	return s.buf
}

// sign calls set with the three headers of a message. The id is new: receivers
// use it to recognise a message that reaches them twice.
func (s *signer) sign(now time.Time, body []byte, set func(key, value string)) {
	id, timestamp := "msg_"+rand.Text(), now.Unix()
	set("webhook-id", id)
	set("webhook-timestamp", strconv.FormatInt(timestamp, 10))
	set("webhook-signature", string(s.signature(id, timestamp, body)))
}
