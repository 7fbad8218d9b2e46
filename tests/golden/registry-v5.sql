-- A registry as version 5 of the schema wrote it.
PRAGMA journal_mode = WAL;
PRAGMA application_id = 1802264947;
PRAGMA user_version = 5;
BEGIN TRANSACTION;
CREATE TABLE builds (
            id INTEGER PRIMARY KEY,
            family TEXT NOT NULL, device TEXT NOT NULL,
            weights TEXT NOT NULL, dataset TEXT NOT NULL, data_fingerprint TEXT NOT NULL,
            command TEXT NOT NULL, settings TEXT NOT NULL, versions TEXT NOT NULL, hardware TEXT NOT NULL,
            started_at TEXT NOT NULL, finished_at TEXT NOT NULL,
            current INTEGER NOT NULL CHECK (current IN (0, 1))
        , removed_at TEXT, manifest TEXT NOT NULL DEFAULT '{}', kind TEXT NOT NULL DEFAULT 'build');
INSERT INTO "builds" VALUES(1,'deit-micro','cpu','pretrained','50 images of clouds','c10d5','klas-zoo build --family deit-micro','{"seeds": [1, 2], "stitches": 4}','{"torch": "9.9"}','an abacus','2026-01-02T03:04:05+00:00','2026-01-01T00:00:00+00:00',0,NULL,'{}','build');
INSERT INTO "builds" VALUES(2,'deit-micro','cpu','pretrained','50 images of clouds','c10d5','klas-zoo build deit-micro','{"seeds": [1, 2], "stitches": 4}','{"torch": "9.9"}','an abacus','2026-01-02T03:04:05+00:00','2026-01-02T03:14:05+00:00',1,NULL,'{}','build');
INSERT INTO "builds" VALUES(3,'deit-micro','a100','pretrained','50 images of clouds','c10d5','klas-zoo build deit-micro','{"seeds": [1, 2], "stitches": 4}','{"torch": "9.9"}','an abacus','2026-01-02T03:04:05+00:00','2026-01-02T03:14:05+00:00',1,NULL,'{}','build');
CREATE TABLE conditions (
            id INTEGER PRIMARY KEY,
            device TEXT NOT NULL, hardware TEXT NOT NULL,
            runtime TEXT NOT NULL, runtime_version TEXT NOT NULL, provider TEXT NOT NULL, options TEXT NOT NULL,
            precision TEXT NOT NULL, threads INTEGER NOT NULL, batch INTEGER NOT NULL, shape TEXT NOT NULL,
            clock TEXT NOT NULL,
            UNIQUE
                (device, hardware, runtime, runtime_version, provider, options, precision, threads, batch, shape, clock)
        );
INSERT INTO "conditions" VALUES(1,'cpu','an abacus','onnxruntime','1.2.3','CPUExecutionProvider','','fp32',1,1,'[1, 3, 8, 8]','host');
INSERT INTO "conditions" VALUES(2,'cpu','an abacus','onnxruntime','1.2.3','CPUExecutionProvider','','fp32',1,8,'[8, 3, 8, 8]','host');
CREATE TABLE "engines" (
            id INTEGER PRIMARY KEY,
            build_id INTEGER NOT NULL REFERENCES builds (id),
            route TEXT NOT NULL, format TEXT NOT NULL, runtime TEXT NOT NULL, precision TEXT NOT NULL,
            status TEXT NOT NULL, reason TEXT NOT NULL,
            file TEXT NOT NULL, package TEXT NOT NULL, sha256 TEXT NOT NULL,
            file_bytes INTEGER NOT NULL, size_bytes INTEGER NOT NULL,
            macs INTEGER NOT NULL, parameters INTEGER NOT NULL,
            input_shape TEXT NOT NULL, num_classes INTEGER NOT NULL, preprocessing TEXT NOT NULL,
            top1 REAL NOT NULL, top5 REAL, images INTEGER NOT NULL, accuracy_source TEXT NOT NULL,
            dataset TEXT NOT NULL, data_fingerprint TEXT NOT NULL, verification TEXT
        , cascade TEXT);
INSERT INTO "engines" VALUES(1,1,'[["old", 1, 4]]','onnx','onnxruntime','fp32','verified','','packages/fc8d097e1e872664b059867e2ed57ac0511e6753a5510305c60a9cb228165e59/old','fc8d097e1e872664b059867e2ed57ac0511e6753a5510305c60a9cb228165e59','cba06b5736faf67e54b07b561eae94395e774c517a7d910a54369e1263ccfbd4',3,3,1000000,5000,'[3, 8, 8]',0,'{}',60.0,NULL,50,'','50 images of clouds','c10d5','{"cosine": null, "images": 50, "largest_fp16": null, "level": null, "max_abs_difference": 1e-05, "min_agreement": 0.99, "min_cosine": null, "most_lost": null, "newly_right": null, "newly_wrong": null, "reference_top1": null, "residual": null, "rounded_difference": null, "rounded_images": null, "tolerance": 0.001, "top1": null, "top1_agreement": 1.0}',NULL);
INSERT INTO "engines" VALUES(2,2,'[["tiny", 1, 4]]','onnx','onnxruntime','fp32','verified','','packages/e4deec6f66b1bf8f3ad01de0c6bd587bf672621b85795fdd31f6e324f461dbe6/tiny','e4deec6f66b1bf8f3ad01de0c6bd587bf672621b85795fdd31f6e324f461dbe6','8950abfda7b727630760dd35bcf5c3daa7631aff223a90f7728c0d2521dde10c',4,4,1000000,5000,'[3, 8, 8]',0,'{}',70.0,NULL,50,'','50 images of clouds','c10d5','{"cosine": null, "images": 50, "largest_fp16": null, "level": null, "max_abs_difference": 1e-05, "min_agreement": 0.99, "min_cosine": null, "most_lost": null, "newly_right": null, "newly_wrong": null, "reference_top1": null, "residual": null, "rounded_difference": null, "rounded_images": null, "tolerance": 0.001, "top1": null, "top1_agreement": 1.0}',NULL);
INSERT INTO "engines" VALUES(3,2,'[["small", 1, 4]]','onnx','onnxruntime','fp32','verified','','packages/e4deec6f66b1bf8f3ad01de0c6bd587bf672621b85795fdd31f6e324f461dbe6/small','e4deec6f66b1bf8f3ad01de0c6bd587bf672621b85795fdd31f6e324f461dbe6','81db8ebbbbc69c6c6ad4a6aa92b76e0c08af547da236b9e2c9dbe1d8285a8130',5,5,1000000,5000,'[3, 8, 8]',0,'{}',75.0,NULL,50,'','50 images of clouds','c10d5','{"cosine": null, "images": 50, "largest_fp16": null, "level": null, "max_abs_difference": 1e-05, "min_agreement": 0.99, "min_cosine": null, "most_lost": null, "newly_right": null, "newly_wrong": null, "reference_top1": null, "residual": null, "rounded_difference": null, "rounded_images": null, "tolerance": 0.001, "top1": null, "top1_agreement": 1.0}',NULL);
INSERT INTO "engines" VALUES(4,2,'[["base", 1, 4]]','onnx','onnxruntime','fp32','verified','','packages/e4deec6f66b1bf8f3ad01de0c6bd587bf672621b85795fdd31f6e324f461dbe6/base','e4deec6f66b1bf8f3ad01de0c6bd587bf672621b85795fdd31f6e324f461dbe6','cae662172fd450bb0cd710a769079c05bfc5d8e35efa6576edc7d0377afdd4a2',4,4,1000000,5000,'[3, 8, 8]',0,'{}',80.0,NULL,50,'','50 images of clouds','c10d5','{"cosine": null, "images": 50, "largest_fp16": null, "level": null, "max_abs_difference": 1e-05, "min_agreement": 0.99, "min_cosine": null, "most_lost": null, "newly_right": null, "newly_wrong": null, "reference_top1": null, "residual": null, "rounded_difference": null, "rounded_images": null, "tolerance": 0.001, "top1": null, "top1_agreement": 1.0}',NULL);
INSERT INTO "engines" VALUES(5,2,'{"measure": "probability", "stages": [{"route": [["tiny", 1, 4]], "shared": 0, "temperature": 1.5, "threshold": 0.8}, {"route": [["base", 1, 4]], "shared": 0, "temperature": 1.0, "threshold": null}]}','onnx','onnxruntime','fp32','verified','','packages/e4deec6f66b1bf8f3ad01de0c6bd587bf672621b85795fdd31f6e324f461dbe6/cascades','e4deec6f66b1bf8f3ad01de0c6bd587bf672621b85795fdd31f6e324f461dbe6','052780f3378567f9686a539d1097ab7cce7cd98837493661a033b6d20a6fa28d',8,8,1000000,5000,'[3, 8, 8]',0,'{}',79.0,NULL,500,'','50 images of clouds','c10d5','{"cosine": null, "images": 50, "largest_fp16": null, "level": null, "max_abs_difference": 1e-05, "min_agreement": 0.99, "min_cosine": null, "most_lost": null, "newly_right": null, "newly_wrong": null, "reference_top1": null, "residual": null, "rounded_difference": null, "rounded_images": null, "tolerance": 0.001, "top1": null, "top1_agreement": 1.0}','{"heldout": {"escalated": [0.2], "escalated_intervals": [[0.16580012584383394, 0.23779183027990658]], "images": 500, "shares": [0.8, 0.2], "top1": 79.0, "top1_interval": [75.16321895128468, 82.48977747071496]}, "test": {"escalated": [0.2], "escalated_intervals": [[0.16580012584383394, 0.23779183027990658]], "images": 500, "shares": [0.8, 0.2], "top1": 79.0, "top1_interval": [75.16321895128468, 82.48977747071496]}}');
INSERT INTO "engines" VALUES(6,3,'[["tiny", 1, 4]]','onnx','onnxruntime','fp32','verified','','packages/c5e0a85df42baf3bc150e61b61ee4277d9abbd4815f08b0d3660b1273dda3b0c/tiny','c5e0a85df42baf3bc150e61b61ee4277d9abbd4815f08b0d3660b1273dda3b0c','8950abfda7b727630760dd35bcf5c3daa7631aff223a90f7728c0d2521dde10c',4,4,1000000,5000,'[3, 8, 8]',0,'{}',70.0,NULL,50,'','50 images of clouds','c10d5','{"cosine": null, "images": 50, "largest_fp16": null, "level": null, "max_abs_difference": 1e-05, "min_agreement": 0.99, "min_cosine": null, "most_lost": null, "newly_right": null, "newly_wrong": null, "reference_top1": null, "residual": null, "rounded_difference": null, "rounded_images": null, "tolerance": 0.001, "top1": null, "top1_agreement": 1.0}',NULL);
CREATE TABLE "latencies" (
            engine_id INTEGER NOT NULL REFERENCES engines (id),
            conditions_id INTEGER NOT NULL REFERENCES conditions (id),
            runs INTEGER NOT NULL,
            min_ms REAL, p50_ms REAL NOT NULL, p90_ms REAL, p99_ms REAL,
            coefficient_of_variation REAL, origin TEXT NOT NULL, measured_at TEXT NOT NULL,
            error_percent REAL, error_method TEXT,
            from_profile INTEGER NOT NULL, mean_ms REAL, worst_ms REAL, paths_ms TEXT,
            PRIMARY KEY (engine_id, conditions_id)
        );
INSERT INTO "latencies" VALUES(1,1,30,3.6,4.0,4.4,6.0,0.02,'measured','2026-01-02T03:04:05+00:00',NULL,NULL,0,NULL,NULL,NULL);
INSERT INTO "latencies" VALUES(2,1,30,0.9,1.0,1.1,1.5,0.02,'measured','2026-01-02T03:04:05+00:00',NULL,NULL,0,NULL,NULL,NULL);
INSERT INTO "latencies" VALUES(2,2,30,4.5,5.0,5.5,7.5,0.02,'measured','2026-01-02T03:04:05+00:00',NULL,NULL,0,NULL,NULL,NULL);
INSERT INTO "latencies" VALUES(3,1,30,1.8,2.0,2.2,3.0,0.02,'measured','2026-01-02T03:04:05+00:00',NULL,NULL,0,NULL,NULL,NULL);
INSERT INTO "latencies" VALUES(3,2,30,5.4,6.0,6.6000000000000005329e+00,9.0,0.02,'measured','2026-01-02T03:04:05+00:00',NULL,NULL,0,NULL,NULL,NULL);
INSERT INTO "latencies" VALUES(4,1,30,2.7,3.0,3.30000000000000026645e+00,4.5,0.02,'measured','2026-01-02T03:04:05+00:00',NULL,NULL,0,NULL,NULL,NULL);
INSERT INTO "latencies" VALUES(4,2,30,6.3,7.0,7.70000000000000106581e+00,10.5,0.02,'measured','2026-01-02T03:04:05+00:00',NULL,NULL,0,NULL,NULL,NULL);
INSERT INTO "latencies" VALUES(5,1,30,0.9,1.0,4.0,4.0,0.02,'measured','2026-01-02T03:04:05+00:00',NULL,NULL,0,1.6000000000000005329e+00,4.0,'[1.0, 4.0]');
INSERT INTO "latencies" VALUES(6,1,30,0.9,1.0,1.1,1.5,0.02,'measured','2026-01-02T03:04:05+00:00',NULL,NULL,0,NULL,NULL,NULL);
CREATE TABLE packages (
            id INTEGER PRIMARY KEY,
            build_id INTEGER NOT NULL REFERENCES builds (id),
            digest TEXT NOT NULL, format TEXT NOT NULL, precision TEXT NOT NULL, size_bytes INTEGER NOT NULL,
            UNIQUE (build_id, digest)
        );
INSERT INTO "packages" VALUES(1,1,'fc8d097e1e872664b059867e2ed57ac0511e6753a5510305c60a9cb228165e59','onnx','fp32',118);
INSERT INTO "packages" VALUES(2,2,'e4deec6f66b1bf8f3ad01de0c6bd587bf672621b85795fdd31f6e324f461dbe6','onnx','fp32',457);
INSERT INTO "packages" VALUES(3,3,'c5e0a85df42baf3bc150e61b61ee4277d9abbd4815f08b0d3660b1273dda3b0c','onnx','fp32',120);
CREATE TABLE tag_moves (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            family TEXT NOT NULL, tag TEXT NOT NULL, device TEXT NOT NULL,
            build_id INTEGER REFERENCES builds (id),
            moved_at TEXT NOT NULL
        , operation INTEGER NOT NULL DEFAULT 0);
INSERT INTO "tag_moves" VALUES(1,'deit-micro','prod','a100',3,'2026-01-03T00:00:00+00:00',1);
INSERT INTO "tag_moves" VALUES(2,'deit-micro','prod','cpu',2,'2026-01-03T00:00:00+00:00',1);
INSERT INTO "tag_moves" VALUES(3,'deit-micro','prod','cpu',1,'2026-01-03T00:00:00+00:00',2);
INSERT INTO "tag_moves" VALUES(4,'deit-micro','gone','a100',3,'2026-01-03T00:00:00+00:00',3);
INSERT INTO "tag_moves" VALUES(5,'deit-micro','gone','cpu',2,'2026-01-03T00:00:00+00:00',3);
INSERT INTO "tag_moves" VALUES(6,'deit-micro','gone','a100',NULL,'2026-01-03T00:00:00+00:00',4);
INSERT INTO "tag_moves" VALUES(7,'deit-micro','gone','cpu',NULL,'2026-01-03T00:00:00+00:00',4);
CREATE INDEX moves_of_a_tag ON tag_moves (family, tag, device, id);
CREATE INDEX engines_of_a_build ON engines (build_id, status);
CREATE INDEX packages_by_digest ON packages (digest);
CREATE UNIQUE INDEX one_current_build ON builds (family, device, hardware) WHERE current;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('tag_moves',7);
COMMIT;
