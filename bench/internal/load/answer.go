// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
)

// maxHead limits the head of an answer.
const maxHead = 16 << 10

// answer is the head of a response.
type answer struct {
	status  int
	length  int // of the content; -1 if the head does not say
	chunked bool
	closes  bool // no other response follows on this connection
}

// reader reads answers from a connection.
type reader struct {
	source io.Reader
	buf    []byte // what was read
	unread []byte // the part of buf that was not used yet
}

// more reads at least one byte. What was unread stays unread.
func (r *reader) more() error {
	kept := copy(r.buf, r.unread)
	if kept == len(r.buf) {
		return errors.New("the head of the answer is too long")
	}
	n, err := r.source.Read(r.buf[kept:])
	r.unread = r.buf[:kept+n]
	if n > 0 {
		return nil
	}
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// head reads the head of the next answer.
func (r *reader) head() (answer, error) {
	searched := 0
	for {
		if end := bytes.Index(r.unread[searched:], []byte("\r\n\r\n")); end >= 0 {
			head := r.unread[:searched+end+2]
			r.unread = r.unread[searched+end+4:]
			return parse(head)
		}
		if len(r.unread) > maxHead {
			return answer{}, errors.New("the head of the answer is too long")
		}
		searched = max(len(r.unread)-3, 0)
		if err := r.more(); err != nil {
			return answer{}, err
		}
	}
}

// line reads the next line of a chunked answer, without its end.
func (r *reader) line() ([]byte, error) {
	for {
		if line, rest, found := bytes.Cut(r.unread, []byte("\r\n")); found {
			r.unread = rest
			return line, nil
		}
		if err := r.more(); err != nil {
			return nil, err
		}
	}
}

// content reads n bytes of content and checks each.
func (r *reader) content(n int, check *checker) error {
	for n > 0 {
		if len(r.unread) == 0 {
			if err := r.more(); err != nil {
				return err
			}
		}
		part := r.unread[:min(n, len(r.unread))]
		if err := check.next(part); err != nil {
			return err
		}
		r.unread = r.unread[len(part):]
		n -= len(part)
	}
	return nil
}

// chunks reads content in chunks, and the trailers after it.
func (r *reader) chunks(check *checker) error {
	for {
		line, err := r.line()
		if err != nil {
			return err
		}
		digits, _, _ := bytes.Cut(line, []byte(";"))
		size, err := strconv.ParseUint(string(bytes.TrimSpace(digits)), 16, 31)
		if err != nil {
			return fmt.Errorf("chunk size %q", line)
		}
		if size == 0 {
			break
		}
		if err := r.content(int(size), check); err != nil {
			return err
		}
		if line, err = r.line(); err != nil || len(line) > 0 {
			return errors.Join(err, errors.New("a chunk does not end where it should"))
		}
	}
	for {
		if line, err := r.line(); err != nil || len(line) == 0 {
			return err
		}
	}
}

// untilEnd reads content that ends with the connection.
func (r *reader) untilEnd(check *checker) error {
	for {
		if err := check.next(r.unread); err != nil {
			return err
		}
		r.unread = nil
		if err := r.more(); err != nil {
			if errors.Is(err, io.ErrUnexpectedEOF) {
				return nil
			}
			return err
		}
	}
}

// rest reads the content of an answer.
func (r *reader) rest(a *answer, check *checker) error {
	var err error
	switch {
	case a.chunked:
		err = r.chunks(check)
	case a.length >= 0:
		err = r.content(a.length, check)
	case a.status == 204 || a.status == 304:
	default:
		a.closes = true
		err = r.untilEnd(check)
	}
	if err != nil {
		return err
	}
	return check.end()
}

// checker compares content with what it must be.
type checker struct {
	want []byte
	any  bool // any content will do
	at   int
}

func (c *checker) next(part []byte) error {
	if !c.any && (c.at+len(part) > len(c.want) || !bytes.Equal(part, c.want[c.at:c.at+len(part)])) {
		return fmt.Errorf("wrong content between bytes %d and %d of %d", c.at, c.at+len(part), len(c.want))
	}
	c.at += len(part)
	return nil
}

func (c *checker) end() error {
	if !c.any && c.at != len(c.want) {
		return fmt.Errorf("%d bytes of content instead of %d", c.at, len(c.want))
	}
	return nil
}

// parse parses the head of an answer, which ends with the end of its last line.
func parse(head []byte) (answer, error) {
	line, fields, _ := bytes.Cut(head, []byte("\r\n"))
	if len(line) < len("HTTP/1.1 200") || !bytes.HasPrefix(line, []byte("HTTP/1.")) {
		return answer{}, fmt.Errorf("not an HTTP answer: %.40q", line)
	}
	status, err := strconv.Atoi(string(line[9:12]))
	if err != nil {
		return answer{}, fmt.Errorf("not an HTTP answer: %.40q", line)
	}
	a := answer{status: status, length: -1, closes: line[7] == '0'}
	for len(fields) > 0 {
		line, fields, _ = bytes.Cut(fields, []byte("\r\n"))
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimSpace(value)
		switch {
		case bytes.EqualFold(name, []byte("Content-Length")):
			length, err := strconv.ParseUint(string(value), 10, 31)
			if err != nil {
				return answer{}, fmt.Errorf("Content-Length %q", value)
			}
			a.length = int(length)
		case bytes.EqualFold(name, []byte("Transfer-Encoding")):
			a.chunked = bytes.EqualFold(value, []byte("chunked"))
		case bytes.EqualFold(name, []byte("Connection")):
			if bytes.EqualFold(value, []byte("close")) {
				a.closes = true
			} else if bytes.EqualFold(value, []byte("keep-alive")) {
				a.closes = false
			}
		}
	}
	return a, nil
}
