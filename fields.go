// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"net/http"
	"net/textproto"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// nameSet is a set of field names in canonical form.
type nameSet map[string]struct{}

func (s nameSet) has(name string) bool {
	_, ok := s[name]
	return ok
}

// listedNames returns the names in a list field such as Connection or Trailer.
func listedNames(values []string) nameSet {
	if len(values) == 0 {
		return nil
	}
	names := make(nameSet)
	for _, value := range values {
		for name := range strings.SplitSeq(value, ",") {
			if name = strings.Trim(name, " \t"); name != "" {
				names[textproto.CanonicalMIMEHeaderKey(name)] = struct{}{}
			}
		}
	}
	return names
}

// countMembers returns the number of members of a list field, including empty ones.
func countMembers(values []string) (n int) {
	for _, value := range values {
		n += strings.Count(value, ",") + 1
	}
	return n
}

// countLines returns the number of field lines in h.
func countLines(h http.Header) (n int) {
	for _, values := range h {
		n += len(values)
	}
	return n
}

// wireName returns the spelling of a canonical field name in messages. Names are
// case-insensitive, but some WebSocket peers only accept the spelling of RFC 6455.
func wireName(name string) string {
	if rest, ok := strings.CutPrefix(name, "Sec-Websocket-"); ok {
		return "Sec-WebSocket-" + rest
	}
	return name
}

// appendField appends a field line. The server accepts only valid fields from clients,
// but the config can make one invalid. Such a field could end the head, so it is
// omitted.
func appendField(b []byte, name, value string) []byte {
	if !httpguts.ValidHeaderFieldName(name) || !httpguts.ValidHeaderFieldValue(value) {
		return b
	}
	return appendLine(b, name, value)
}

// appendLine appends a field line. The name and value must be valid.
func appendLine(b []byte, name, value string) []byte {
	b = append(b, name...)
	b = append(b, ": "...)
	b = append(b, value...)
	return append(b, "\r\n"...)
}

// fieldSet collects field lines. The first values of all names share one array.
type fieldSet struct {
	header http.Header
	values []string
}

// newFields returns a fieldSet with room for n lines, but for no more than messages usually
// have: many lines may be short and share a name.
func newFields(n int) *fieldSet {
	n = min(n, 64)
	return &fieldSet{make(http.Header, n), make([]string, 0, n)}
}

func (f *fieldSet) add(name, value string) {
	if prior, ok := f.header[name]; ok {
		f.header[name] = append(prior, value)
		return
	}
	f.values = append(f.values, value)
	f.header[name] = f.values[len(f.values)-1 : len(f.values) : len(f.values)]
}

func appendStatusLine(b []byte, status int) []byte {
	b = append(b, "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(status), 10)
	b = append(b, ' ')
	if text := http.StatusText(status); text != "" {
		b = append(b, text...)
	} else {
		b = append(b, "status code "...)
		b = strconv.AppendInt(b, int64(status), 10)
	}
	return append(b, "\r\n"...)
}
