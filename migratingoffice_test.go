// SPDX-FileCopyrightText: The async_proxy authors
// SPDX-License-Identifier: Apache-2.0

//go:build linux

package asyncproxy

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// officeLists are the lists of the office, in Squid's syntax.
var officeLists = map[string]string{
	"ads":      ".ads.example.net\n# a comment\nbanner.example.com\n",
	"social":   ".social.example.org\n",
	"packages": ".packages.example.com\ncode.example.com\n",
	"updates":  ".updates.example.com\n",
	"payment":  ".pay.example.com\n",
}

// writeOffice writes the lists and the users of the office for Squid, and from them, as the document
// says, those for Caddy. It returns what the two configurations are to have instead of their paths.
func writeOffice(t *testing.T) *strings.Replacer {
	t.Helper()
	dir := openDir(t)
	squid, ours := filepath.Join(dir, "squid"), filepath.Join(dir, "caddy")
	for _, path := range []string{squid, ours} {
		if err := os.Mkdir(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	command := strings.TrimPrefix(blockOf(t, "Office", "console", 0), "$ ")
	for name, list := range officeLists {
		if err := os.WriteFile(filepath.Join(squid, name), []byte(list), 0o644); err != nil {
			t.Fatal(err)
		}
		convert := strings.NewReplacer("/etc/squid/lists/ads", filepath.Join(squid, name), "/etc/caddy/lists/ads", filepath.Join(ours, name)).Replace(command)
		if out, err := exec.Command("sh", "-c", convert).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v %s", convert, err, out)
		}
	}
	var users strings.Builder
	for _, user := range []string{"alice", "carol"} {
		hash, err := bcrypt.GenerateFromPassword([]byte("wonderland"), bcrypt.MinCost)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&users, "%s:%s\n", user, hash)
	}
	passwords := filepath.Join(dir, "users")
	if err := os.WriteFile(passwords, []byte(users.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	return strings.NewReplacer("/etc/squid/lists", squid, "/etc/caddy/lists", ours, "/etc/squid/passwd", passwords, "/etc/caddy/proxy-users", passwords)
}

// The policies of the office give the same answers as Squid's lists.
func TestMigratingFromSquid(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	everywhere(t)
	files := writeOffice(t)
	requests := `
		192.168.10.5 GET http://www.example.com/
		192.168.10.5 GET http://www.ads.example.net/
		192.168.10.5 alice:wrong GET http://www.example.com/
		192.168.10.5 alice:wonderland GET http://www.example.com/
		192.168.10.5 alice:wonderland CONNECT www.example.com:443
		192.168.10.5 alice:wonderland CONNECT www.example.com:8080
		192.168.10.5 alice:wonderland GET http://www.example.com:81/
		192.168.10.5 alice:wonderland POST http://www.example.com:8080/
		192.168.10.5 alice:wonderland CONNECT www.ads.example.net:443
		192.168.10.5 alice:wonderland GET http://banner.example.com/
		192.168.10.5 alice:wonderland GET http://8.8.8.8/
		192.168.10.5 alice:wonderland GET http://8.8.4.4/
		192.168.10.5 alice:wonderland GET http://127.0.0.1/
		192.168.10.5 alice:wonderland GET http://local.example.com/
		192.168.10.5 alice:wonderland GET http://10.9.9.9/
		192.168.10.5 alice:wonderland GET http://intranet.example.com/
		192.168.10.5 carol:wonderland GET http://chat.social.example.org/
		192.168.10.5 carol:wonderland GET http://ads.example.net/
		192.168.20.5 GET http://www.example.com/
		192.168.20.5 alice:wonderland GET http://chat.social.example.org/
		192.168.20.5 alice:wonderland CONNECT www.example.com:443
		192.168.20.5 alice:wonderland GET http://x.ads.example.net/
		192.168.30.5 GET http://packages.example.com/
		192.168.30.5 CONNECT eu.packages.example.com:443
		192.168.30.5 CONNECT code.example.com:443
		192.168.30.5 CONNECT code.example.com:22
		192.168.30.5 GET http://x.code.example.com/
		192.168.30.5 GET http://updates.example.com/
		192.168.30.5 GET http://till.pay.example.com/
		192.168.30.5 GET http://www.example.com/
		192.168.30.5 alice:wonderland GET http://www.example.com/
		192.168.30.5 GET http://ads.example.net/
		192.168.40.5 CONNECT till.pay.example.com:443
		192.168.40.5 POST http://pay.example.com/
		192.168.40.5 GET http://updates.example.com/
		192.168.40.5 GET http://packages.example.com/
		192.168.40.5 GET http://www.example.com/
		192.168.50.5 GET http://a.updates.example.com/
		192.168.50.5 GET http://packages.example.com/
		192.168.50.5 CONNECT www.example.com:443
		192.168.60.5 GET http://www.example.com/
		192.168.60.5 CONNECT www.example.com:443
		192.168.60.5 POST http://www.example.com/
		192.168.60.5 GET http://social.example.org/
		192.168.60.5 GET http://www.ads.example.net/
		192.168.70.5 GET http://www.example.com/
		192.168.70.5 alice:wonderland GET http://www.example.com/
	`
	squid, ours := files.Replace(blockOf(t, "Office", "squid", 0)), files.Replace(blockOf(t, "Office", "caddyfile", 0))
	now := time.Now()
	other := now.Add(72 * time.Hour) // a day that is not today, even if the test runs at midnight
	for _, lunch := range []struct {
		name, squid, ours string
		status            int
	}{
		{"at lunch", "time SMTWHFA 00:00-24:00", "'UTC') in [0, 1, 2, 3, 4, 5, 6] && 12", http.StatusOK},
		{"on another day", "time " + "SMTWHFA"[other.Weekday():][:1] + " 00:00-24:00", fmt.Sprintf("'UTC') in [%d] && 12", other.Weekday()), http.StatusForbidden},
	} {
		t.Run(lunch.name, func(t *testing.T) {
			day := "'Europe/Berlin') in [1, 2, 3, 4, 5] &&\n\t\t\t\t\ttimestamp(int({time.now.unix})).getHours('Europe/Berlin')"
			if !strings.Contains(ours, day) || !strings.Contains(squid, "time MTWHF 12:00-13:00") {
				t.Fatal("the hours of the example have changed")
			}
			startSquid(t, strings.Replace(squid, "time MTWHF 12:00-13:00", lunch.squid, 1))
			startMigrated(t, strings.Replace(ours, day, lunch.ours, 1))
			migration{section: "Office", requests: requests + "192.168.10.5 alice:wonderland GET http://chat.social.example.org/"}.compare(t)
			if status := ask(t, "127.0.0.1:3128", "192.168.10.5", "GET http://social.example.org/", "alice", "wonderland"); status != lunch.status {
				t.Errorf("social networks %s: %d", lunch.name, status)
			}
		})
	}
	t.Run("the hour", func(t *testing.T) { checkHour(t, ours) })
}

// checkHour checks that the expression of the example names the hour from 12 to 13 in Berlin: with
// the present hour in place of 12 it holds, and with another it does not.
func checkHour(t *testing.T, config string) {
	t.Helper()
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	for _, later := range []int{0, 12} {
		var status, hour int
		for {
			hour = time.Now().In(berlin).Hour()
			text := strings.Replace(config, "== 12", fmt.Sprintf("== %d", (hour+later)%24), 1)
			startMigrated(t, strings.Replace(text, "[1, 2, 3, 4, 5]", "[0, 1, 2, 3, 4, 5, 6]", 1))
			status = ask(t, "127.0.0.1:3128", "192.168.10.5", "GET http://social.example.org/", "alice", "wonderland")
			if hour == time.Now().In(berlin).Hour() {
				break
			}
		}
		if (status == http.StatusOK) != (later == 0) {
			t.Errorf("at %d o'clock in Berlin, %d hours from the one in the expression: %d", hour, later, status)
		}
	}
}
