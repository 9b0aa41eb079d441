// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package h1

import (
	"net/http"
	"net/textproto"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/net/http/httpguts"
)

// NameSet is a set of field names in canonical form.
type NameSet map[string]struct{}

// Has reports whether the set contains name, which is in canonical form.
func (s NameSet) Has(name string) bool {
	_, ok := s[name]
	return ok
}

// ListedNames returns the names in a list field such as Connection or Trailer.
func ListedNames(values []string) NameSet {
	if len(values) == 0 {
		return nil
	}
	names := make(NameSet)
	for _, value := range values {
		for name := range strings.SplitSeq(value, ",") {
			if name = strings.Trim(name, " \t"); name != "" {
				names[textproto.CanonicalMIMEHeaderKey(name)] = struct{}{}
			}
		}
	}
	return names
}

// CountMembers returns the number of members of a list field, including empty ones.
func CountMembers(values []string) (n int) {
	for _, value := range values {
		n += strings.Count(value, ",") + 1
	}
	return n
}

// CountLines returns the number of field lines in h.
func CountLines(h http.Header) (n int) {
	for _, values := range h {
		n += len(values)
	}
	return n
}

// WireName returns the spelling of a canonical field name in messages. Names are
// case-insensitive, but some WebSocket peers only accept the spelling of RFC 6455.
func WireName(name string) string {
	if rest, ok := strings.CutPrefix(name, "Sec-Websocket-"); ok {
		return "Sec-WebSocket-" + rest
	}
	return name
}

// AppendField appends a field line. The server accepts only valid fields from clients,
// but the config can make one invalid. Such a field could end the head, so it is
// omitted.
func AppendField(b []byte, name, value string) []byte {
	if !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value) {
		return b
	}
	return AppendLine(b, name, value)
}

// AppendLine appends a field line. The name and value must be valid.
func AppendLine(b []byte, name, value string) []byte {
	b = append(b, name...)
	b = append(b, ": "...)
	b = append(b, value...)
	return append(b, "\r\n"...)
}

// headerPool is a pool of empty headers.
var headerPool = sync.Pool{New: func() any { return make(http.Header, 8) }}

// MaxFreedHeader is the largest number of fields of a header for FreeHeader.
const MaxFreedHeader = 32

// NewHeader returns an empty header.
func NewHeader() http.Header { return headerPool.Get().(http.Header) }

// FreeHeader gives a header back to NewHeader. Nothing may use it any longer, and it must not have
// had more than MaxFreedHeader fields before some were removed: its memory would be kept.
func FreeHeader(h http.Header) {
	if h != nil && len(h) <= MaxFreedHeader {
		clear(h)
		headerPool.Put(h)
	}
}

// fieldSet collects field lines. The first values of all names share one array.
type fieldSet struct {
	Header http.Header
	values []string
}

// NewFields returns a fieldSet that adds fields to h. It has room for n lines, but for no more than
// messages usually have: many lines may be short and share a name.
func NewFields(h http.Header, n int) *fieldSet {
	return &fieldSet{h, make([]string, 0, min(n, 64))}
}

func (f *fieldSet) Add(name, value string) {
	if prior, ok := f.Header[name]; ok {
		f.Header[name] = append(prior, value)
		return
	}
	f.values = append(f.values, value)
	f.Header[name] = f.values[len(f.values)-1 : len(f.values) : len(f.values)]
}

// AppendStatusLine appends the status line of a response with the given status. Without a reason
// phrase it has the registered one.
func AppendStatusLine(b []byte, status int, reason string) []byte {
	b = append(b, "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(status), 10)
	b = append(b, ' ')
	if reason == "" {
		reason = http.StatusText(status)
	}
	if reason != "" {
		b = append(b, reason...)
	} else {
		b = append(b, "status code "...)
		b = strconv.AppendInt(b, int64(status), 10)
	}
	return append(b, "\r\n"...)
}

// newlineReplacer replaces CR and LF in field values, to prevent header injection.
var newlineReplacer = strings.NewReplacer("\n", " ", "\r", " ")

// AppendValues appends a field with a line for each value. It appends none if the name is
// malformed.
func AppendValues(b []byte, name string, values []string) []byte {
	if !httpguts.ValidHeaderFieldName(name) {
		return b
	}
	name = WireName(name)
	for _, value := range values {
		if strings.ContainsAny(value, "\r\n") {
			value = newlineReplacer.Replace(value)
		}
		b = AppendLine(b, name, textproto.TrimString(value))
	}
	return b
}
