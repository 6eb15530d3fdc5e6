package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"
)

// maxAnswer is above the answer to a batch of maxBatch ids.
const maxAnswer = 1 << 20

// report passes the first n answers of the batch to the truth, but for those that are
// thrown away.
func (c *conn) report(sent time.Time, from int64, n int) {
	if c.discard(n, from); len(c.got) > 0 {
		c.answered = true
		c.newest = c.d.truth.record(c.target, sent, c.got)
	}
}

// read fills c.got with the answers of the batch, or with the first ones of them up to
// most ids or a little more. It returns how many ids were answered, how much longer the
// server may work on the others, and whether the connection can be used again.
func (c *conn) read(most int) (answered int, lag time.Duration, alive bool) {
	for answered < most {
		err := c.reply.ReadLimitBody(c.in, maxAnswer)
		if err != nil && c.failed != nil {
			return answered, c.d.lag(c.failed), false
		}
		n := c.inRequest(c.ids[answered:])
		if err == nil {
			err = c.take(c.ids[answered : answered+n])
		}
		if err != nil {
			c.d.protocol("id #%d: %v", c.ids[answered].id, err)
			return answered, 0, false
		}
		answered += n
		if c.reply.ConnectionClose() {
			return answered, 0, false
		}
	}
	if left := c.in.Buffered(); left > 0 && answered == len(c.ids) {
		text, _ := c.in.Peek(min(left, 40)) // it is there
		c.d.protocol("%d bytes after the last answer: %q", left, text)
		return answered, 0, false
	}
	return answered, 0, true
}

// take turns the reply to a request into answers for the truth, one for each id.
func (c *conn) take(asks []ask) error {
	if err := c.readWords(len(asks)); err != nil {
		return err
	}
	if len(c.words) != len(asks) {
		return fmt.Errorf("%d words in the answer to a batch of %d", len(c.words), len(asks))
	}
	first, judged, replays := len(c.got), 0, false
	for i, ask := range asks {
		got, known := meanings[string(c.words[i])]
		switch {
		case !known:
			return fmt.Errorf("unexpected word %.40q", c.words[i])
		case got.replayed && ask.token == 0:
			return errors.New("an id is replayed that has no token")
		case got.kind != answerRefused:
			judged++
		}
		got.id, got.token, replays = ask.id, ask.token, replays || got.replayed
		c.got = append(c.got, got)
	}
	if judged == 0 {
		return nil
	}
	return c.place(c.got[first:], judged, replays)
}

// meanings of the words in the answer to a batch.
var meanings = map[string]answer{
	"ok":          {kind: answerOK},
	"duplicate":   {kind: answerRepeat},
	"replayed":    {kind: answerOK, replayed: true},
	"full":        {kind: answerRefused},
	"unavailable": {kind: answerRefused},
	"draining":    {kind: answerRefused},
}

// readWords fills c.words with the verdicts of the reply to a request for n ids: the words
// that the answer to a batch has.
func (c *conn) readWords(n int) error {
	status, body, replayed := c.reply.StatusCode(), c.reply.Body(), len(c.reply.Header.Peek("Verve-Replayed")) > 0
	c.words = c.words[:0]
	switch {
	case (status == 503 || status == 408) && string(body) == "failed": // 408: this machine is busy, and the server stops waiting
		for range n {
			c.words = append(c.words, []byte("unavailable"))
		}
	case status == 200 && c.d.Batch > 0 && c.d.items():
		return c.readItems(body)
	case status == 200 && c.d.Batch > 0:
		lines, ok := bytes.CutSuffix(body, []byte{'\n'})
		if !ok {
			return errors.New("the answer to a batch ends within a line")
		}
		c.words = slices.AppendSeq(c.words, bytes.SplitSeq(lines, []byte{'\n'}))
	case status == 200 && string(body) == "ok" && replayed:
		c.words = append(c.words, []byte("replayed"))
	case status == 200 && string(body) == "ok":
		c.words = append(c.words, []byte("ok"))
	case status == c.d.DuplicateStatus && string(body) == "failed" && !replayed:
		c.words = append(c.words, []byte("duplicate"))
	default:
		return fmt.Errorf("unexpected answer: status %d, body %.40q", status, body)
	}
	return nil
}

// readItems takes the answer to a batch in JSON.
func (c *conn) readItems(body []byte) error {
	var answer struct {
		OK, Duplicate, Replayed, Refused int
		Results                          []string
	}
	if err := json.Unmarshal(body, &answer); err != nil {
		return fmt.Errorf("the answer to a batch: %w", err)
	}
	n := map[string]int{}
	for _, word := range answer.Results {
		c.words = append(c.words, []byte(word))
		n[word]++
	}
	ok, duplicate, replayed := n["ok"], n["duplicate"], n["replayed"]
	if answer.OK != ok || answer.Duplicate != duplicate || answer.Replayed != replayed || answer.Refused != len(c.words)-ok-duplicate-replayed {
		return fmt.Errorf("the numbers in the answer to a batch are not those of its results: %.80q", body)
	}
	return nil
}

// place finds the windows of the answers to a request. If they are several and an id is
// replayed, the list does not tell which ids were counted in which of them: they are
// asked once more, in smaller batches.
func (c *conn) place(got []answer, judged int, replays bool) error {
	if err := c.readWindows(judged); err != nil {
		return err
	}
	window, left := 0, c.windows[0].ids
	for i := range got {
		if got[i].kind == answerRefused {
			continue
		}
		if replays && len(c.windows) > 1 {
			got[i].kind, got[i].window = answerUnplaced, c.windows[len(c.windows)-1].start
			continue
		}
		for ; left == 0; left = c.windows[window].ids {
			window++
		}
		left--
		got[i].window = c.windows[window].start
	}
	return nil
}

// judgedIn is a window of an answer, and how many of its ids were judged there, in order.
type judgedIn struct {
	start int64
	ids   int
}

// readWindows reads the Verve-Window of the reply, in which so many ids were judged: one by
// itself, or a list with numbers of ids.
func (c *conn) readWindows(judged int) error {
	text, sum := c.reply.Header.Peek("Verve-Window"), 0
	if len(text) == 0 {
		return errors.New("the answer has no Verve-Window: start the server with --window-header")
	}
	c.windows = c.windows[:0]
	for part := range bytes.SplitSeq(text, []byte(", ")) {
		label, count, many := bytes.Cut(part, []byte(";n="))
		start, err := time.Parse(time.RFC3339, string(label))
		in := judgedIn{start.UnixMilli(), judged}
		if many && err == nil {
			in.ids, err = strconv.Atoi(string(count))
		}
		if err != nil {
			return fmt.Errorf("Verve-Window: %w", err)
		}
		c.windows = append(c.windows, in)
		sum += in.ids
	}
	if sum != judged {
		return fmt.Errorf("%d ids were judged, and the answer has %q", judged, text)
	}
	return nil
}
