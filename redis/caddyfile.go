// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package redis

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// UnmarshalCaddyfile sets up the limiter from Caddyfile tokens. Syntax:
//
//	redis <address...> {
//		username <name>
//		password <password>
//		tls      [<ca_file>]
//		db       <number>
//		sentinel <name_of_the_set>
//		prefix   <prefix_of_keys>
//		timeout  <duration>
//		on_error local|allow|deny
//	}
func (l *Limiter) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // the module's name
	for d.NextArg() {
		if hasUser(d.Val()) {
			return d.Errf("redis: a value is a URL or has a user; expected %s", expectedAddresses)
		}
		if !strings.Contains(d.Val(), "{") { // a placeholder is checked once it is replaced
			if _, ok := parseAddress(d.Val()); !ok {
				return d.Errf("redis: the value '%s' is not valid; expected %s", d.Val(), expectedAddresses)
			}
		}
		l.Addresses = append(l.Addresses, d.Val())
	}
	if len(l.Addresses) == 0 {
		return d.Errf("redis: missing value; expected %s", expectedAddresses)
	}
	seen := make(map[string]bool)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		name := d.Val()
		if _, known := expectations[name]; !known {
			return d.Errf("unrecognized option '%s'; expected one of %s", name, strings.Join(slices.Sorted(maps.Keys(expectations)), ", "))
		}
		if seen[name] {
			return d.Errf("%s: the option is set twice; expected it once", name)
		}
		seen[name] = true
		if err := l.option(d, name, d.RemainingArgs()); err != nil {
			return err
		}
		if last := d.Val(); d.NextBlock(d.Nesting()) || d.Val() != last { // for an empty block, NextBlock returns false but advances
			return d.Errf("%s: unexpected block; expected %s", name, expectations[name])
		}
	}
	return nil
}

const expectedAddresses = "addresses of servers as " + expectedAddress

// expectations describe the values of the options in errors.
var expectations = map[string]string{
	"username": "a name",
	"password": "a password, such as {env.REDIS_PASSWORD}",
	"tls":      "no value, or a file with certificates",
	"db":       "the number of a database, from 0",
	"sentinel": "the name of the set of servers that the sentinels watch over",
	"prefix":   "a name without spaces and braces",
	"timeout":  "a positive duration such as 50ms",
	"on_error": "local, allow or deny",
}

// option parses one option and its arguments. Errors never contain a password.
func (l *Limiter) option(d *caddyfile.Dispenser, name string, args []string) error {
	if name == "tls" && len(args) == 0 {
		l.TLS = new(TLS)
		return nil
	}
	switch {
	case len(args) == 0:
		return d.Errf("%s: missing value; expected %s", name, expectations[name])
	case len(args) > 1:
		return d.Errf("%s: more than one value; expected %s", name, expectations[name])
	}
	value, ok := args[0], args[0] != ""
	switch name {
	case "username":
		l.Username = value
	case "password":
		l.Password = value
	case "tls":
		l.TLS = &TLS{CA: value}
	case "db":
		n, err := strconv.ParseUint(value, 10, 31)
		l.DB, ok = int(n), err == nil
	case "sentinel":
		l.Sentinel = value
	case "prefix":
		l.Prefix = value
		ok = validPrefix(value)
	case "timeout":
		timeout, err := caddy.ParseDuration(value)
		l.Timeout, ok = caddy.Duration(timeout), err == nil && timeout > 0
	case "on_error":
		l.OnError = value
		ok = validOnError(value)
	}
	if !ok {
		return d.Errf("%s: the value '%s' is not valid; expected %s", name, value, expectations[name])
	}
	return nil
}

// Interface guard
var _ caddyfile.Unmarshaler = (*Limiter)(nil)
