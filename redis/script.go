// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

package redis

import (
	_ "embed"
	"strconv"
	"strings"
	"time"

	asyncproxy "github.com/asyncproxy/caddy-async-proxy"
	"github.com/redis/rueidis"
)

// takeText is the script that takes a token from a bucket. It is loaded into Redis once,
// and then called by its hash.
//
//go:embed take.lua
var takeText string

var takeScript = rueidis.NewLuaScript(takeText)

// bucketKey returns the key of a bucket in Redis. The zone may contain anything but spaces,
// quotes and backslashes, so it comes last: no two buckets have the same key.
func bucketKey(prefix string, b asyncproxy.Bucket) string {
	key := make([]byte, 0, 96)
	key = append(key, prefix...)
	key = append(key, ':')
	key = strconv.AppendInt(key, b.Burst, 10)
	key = append(key, ':')
	key = strconv.AppendInt(key, int64(b.Interval), 10)
	key = append(key, ':')
	switch {
	case b.User != "":
		key = strconv.AppendQuote(key, b.User)
	case b.Client.IsValid():
		key = b.Client.AppendTo(key)
	default:
		key = append(key, "unix"...)
	}
	key = append(key, ':')
	key = append(key, b.Zone...)
	if b.Policy != "" {
		key = append(append(key, ' '), b.Policy...) // neither name has spaces
	}
	return braces.Replace(string(key))
}

// braces escapes braces. Without any, a cluster hashes the whole key of a bucket to choose
// its node.
var braces = strings.NewReplacer("{", `\x7b`, "}", `\x7d`)

// bucketArgs returns the arguments of the script.
func bucketArgs(burst int64, interval time.Duration) []string {
	fill := time.Duration(burst) * interval
	return []string{
		strconv.FormatInt(int64(interval/time.Second), 10), strconv.FormatInt(int64(interval%time.Second), 10),
		strconv.FormatInt(int64(fill/time.Second), 10), strconv.FormatInt(int64(fill%time.Second), 10),
	}
}

// probeKey returns the key of a bucket for probing Redis. In a cluster it is on the same
// node as the bucket with the given key, because only the part in braces is hashed.
func probeKey(prefix, key string) string { return prefix + ":{" + key + "}" }

// probeArgs are the arguments for a bucket that is never empty and expires quickly.
var probeArgs = bucketArgs(1_000_000_000, 1)
