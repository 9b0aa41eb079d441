// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package asyncproxy

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"golang.org/x/net/http/httpguts"

	"github.com/asyncproxy/caddy-async-proxy/internal/access"
	"github.com/asyncproxy/caddy-async-proxy/internal/status"
)

// optionValue is how the value of an option is parsed, checked and shown. Each function but
// set and parse may be nil.
type optionValue struct {
	expected   string                                     // the valid values, as error messages name them
	repeatable bool                                       // it may be repeated, with any number of values
	set        func(h *Handler, text string) bool         // parses and stores one value; false if it is not valid
	parse      func(p *caddyfileParser, h *Handler) error // replaces set: parses everything after the name
	isSet      func(h *Handler) bool                      // reports whether h has a value, and not the default
	invalid    func(h *Handler) (text string, bad bool)   // returns the value if it is not valid
	setDefault func(h *Handler)                           // stores the default if h has no value
	show       func(h *Handler) string                    // returns the value for the status page
	showAll    func(y *policy) []status.Setting           // replaces show, if the status page has several lines for it
}

// shownAs returns v with other lines on the status page.
func (v optionValue) shownAs(showAll func(*policy) []status.Setting) optionValue {
	v.showAll = showAll
	return v
}

const (
	// maxCount keeps numbers in the range that a float64 holds exactly, because
	// Caddy's JSON passes through float64.
	maxCount    = 1_000_000_000
	maxDuration = caddy.Duration(1 << 62) // 146 years
	minDuration = caddy.Duration(time.Millisecond)
)

// setIfZero stores the default of a field that has no value.
func setIfZero[T comparable](field *T, byDefault T) {
	var zero T
	if *field == zero {
		*field = byDefault
	}
}

// number returns the value of an option for a whole number from low to high.
func number[T int | int64](unit string, field func(*Handler) *T, low, high, byDefault T) optionValue {
	return optionValue{
		expected: fmt.Sprintf("%s from %d to %d", unit, low, high),
		set: func(h *Handler, s string) (ok bool) {
			*field(h), ok = parseInt(s, low, high)
			return ok
		},
		isSet:      func(h *Handler) bool { return *field(h) != 0 },
		invalid:    func(h *Handler) (string, bool) { return wholeNumber(*field(h)), *field(h) < low || *field(h) > high },
		setDefault: func(h *Handler) { setIfZero(field(h), byDefault) },
		show:       func(h *Handler) string { return wholeNumber(*field(h)) },
	}
}

func wholeNumber[T int | int64](n T) string { return strconv.FormatInt(int64(n), 10) }

// decimal returns the value of an option for a number from low to high.
func decimal(unit string, field func(*Handler) *float64, low, high, byDefault float64) optionValue {
	text := func(f float64) string { return strconv.FormatFloat(f, 'f', -1, 64) }
	valid := func(f float64) bool { return f >= low && f <= high } // false for NaN
	return optionValue{
		expected: fmt.Sprintf("%s from %s to %s", unit, text(low), text(high)),
		set: func(h *Handler, s string) bool {
			f, err := strconv.ParseFloat(s, 64)
			*field(h) = f
			return err == nil && valid(f)
		},
		isSet:      func(h *Handler) bool { return *field(h) != 0 },
		invalid:    func(h *Handler) (string, bool) { return fmt.Sprint(*field(h)), !valid(*field(h)) },
		setDefault: func(h *Handler) { setIfZero(field(h), byDefault) },
		show:       func(h *Handler) string { return text(*field(h)) },
	}
}

// word returns the value of an option for one word, which is stored verbatim.
func word(expected string, field func(*Handler) *string, valid func(string) bool, byDefault string) optionValue {
	return optionValue{
		expected: expected,
		set: func(h *Handler, s string) bool {
			*field(h) = s
			return valid(s)
		},
		isSet:      func(h *Handler) bool { return *field(h) != "" },
		invalid:    func(h *Handler) (string, bool) { return *field(h), !valid(*field(h)) },
		setDefault: func(h *Handler) { setIfZero(field(h), byDefault) },
		show:       func(h *Handler) string { return *field(h) },
	}
}

// choice returns the value of an option for one of two words. The first is the default.
func choice(field func(*Handler) *string, byDefault, other string) optionValue {
	return word(byDefault+" or "+other, field, func(s string) bool { return s == byDefault || s == other }, byDefault)
}

// list returns the value of an option for any number of words. The status page shows none if
// there are none.
func list(expected string, field func(*Handler) *[]string, check func(string) error, none string) optionValue {
	return optionValue{
		expected: expected, repeatable: true,
		set: func(h *Handler, s string) bool {
			*field(h) = append(*field(h), s)
			return check(s) == nil
		},
		invalid: func(h *Handler) (string, bool) {
			i := slices.IndexFunc(*field(h), func(s string) bool { return check(s) != nil })
			if i < 0 {
				return "", false
			}
			return (*field(h))[i], true
		},
		show: func(h *Handler) string { return words(*field(h), none) },
	}
}

// duration returns the value of an option for a positive duration. Without a default, it
// means no limit.
func duration(field func(*Handler) *caddy.Duration, byDefault time.Duration) optionValue {
	example, none := shortDuration(byDefault), ""
	if byDefault == 0 {
		example, none = "24h", "none"
	}
	return optionValue{
		expected: "a duration of at least 1ms, such as " + example,
		set: func(h *Handler, s string) (ok bool) {
			*field(h), ok = parseDuration(s)
			return ok && *field(h) >= minDuration
		},
		isSet: func(h *Handler) bool { return *field(h) != 0 },
		invalid: func(h *Handler) (string, bool) {
			return time.Duration(*field(h)).String(), *field(h) < 0 || tooShort(*field(h)) || *field(h) > maxDuration
		},
		setDefault: func(h *Handler) { setIfZero(field(h), caddy.Duration(byDefault)) },
		show: func(h *Handler) string {
			if *field(h) == 0 {
				return none
			}
			return shortDuration(time.Duration(*field(h)))
		},
	}
}

// durationOrOff returns the value of an option for a positive duration, or for off, which
// every negative duration means as well.
func durationOrOff(field func(*Handler) *caddy.Duration, byDefault time.Duration) optionValue {
	v := duration(field, byDefault)
	v.expected += ", or off"
	set, show := v.set, v.show
	v.set = func(h *Handler, s string) bool {
		if s == "off" {
			*field(h) = -1
			return true
		}
		return set(h, s)
	}
	v.invalid = func(h *Handler) (string, bool) {
		return time.Duration(*field(h)).String(), tooShort(*field(h)) || *field(h) > maxDuration
	}
	v.show = func(h *Handler) string {
		if *field(h) < 0 {
			return "off"
		}
		return show(h)
	}
	return v
}

// ruleList returns the value of an option that adds rules.
func ruleList(expected string, parse func(*caddyfileParser, *Handler) error) optionValue {
	return optionValue{expected: expected, repeatable: true, parse: parse}
}

func parseInt[T int | int64](s string, low, high T) (T, bool) {
	n, err := strconv.ParseInt(s, 10, 64)
	return T(n), err == nil && n >= int64(low) && n <= int64(high)
}

// tooShort reports whether a duration is most likely meant to be longer: a bare number in JSON counts
// nanoseconds.
func tooShort(d caddy.Duration) bool { return 0 < d && d < minDuration }

// parseDuration parses a duration that is not negative.
func parseDuration(s string) (caddy.Duration, bool) {
	d, err := caddy.ParseDuration(s)
	return caddy.Duration(d), err == nil && d >= 0 && caddy.Duration(d) <= maxDuration
}

var errInvalid = errors.New("the value is not valid")

func oneOf(words ...string) func(string) error {
	return func(s string) error {
		if !slices.Contains(words, s) {
			return errInvalid
		}
		return nil
	}
}

func checkPorts(s string) error {
	_, err := access.ParsePorts(s)
	return err
}

func checkMethod(s string) error {
	if s == allMethods {
		return nil
	}
	if !httpguts.ValidHeaderFieldName(s) || s != strings.ToUpper(s) {
		return errInvalid
	}
	return nil
}

func checkPlaceholder(s string) error {
	if len(s) < 3 || s[0] != '{' || s[len(s)-1] != '}' {
		return errInvalid
	}
	return nil
}

func checkClients(s string) error {
	if s == allClients {
		return nil
	}
	return checkRange(s)
}

func checkRange(s string) error {
	_, err := parsePrefixes("", []string{s})
	return err
}

func checkDirect(s string) error {
	_, err := access.NewDirectSet([]string{s})
	return err
}

func checkResolver(s string) error {
	_, err := parseResolvers([]string{s})
	return err
}

// checkDestination checks a destination of a rule.
func checkDestination(text string) error {
	for _, text := range access.ExpandRanges(text) {
		if _, err := access.ParseDestination(text); err != nil {
			return err
		}
	}
	return nil
}

// invalidValue returns the error for an invalid value of an option. If the intended
// destination is obvious, the error says how to write it.
func invalidValue(option, expected, value string) error {
	_, err := access.ParseDestination(value)
	if bits := new(access.HostBitsError); errors.As(err, &bits) || strings.HasPrefix(value, ".") && strings.Contains(expected, "*.names") {
		return fmt.Errorf("%s: %w", option, err)
	}
	return fmt.Errorf("%s: the value '%s' is not valid; expected %s", option, value, expected)
}
